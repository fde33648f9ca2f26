"""Tensors that a target's shapes make of what is in files, which do not tell by themselves.

Flat parameters are split (`edit.flat`). Slices of tensor parallelism are joined: along the one
dimension in which they are smaller than the tensor that is wanted, where they add up to it. Of what
has the shape that is wanted in every file, all have to be the same to the bit. Which parts of a
slice belong together is not told by shapes where several matrices were one before it was cut (q, k
and v; gate and up): those are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import door
from ckptfix.bytes.place import Place
from ckptfix.contents.state_dicts import Made, find
from ckptfix.contents.tensors import as_tensor
from ckptfix.door import fixing_for_a_model
from ckptfix.edit import flat
from ckptfix.errors import DamagedError, UnsafeError, UnsupportedError
from ckptfix.hints import Hint, command, shell
from ckptfix.layouts import tensor_parallel
from ckptfix.pieces import replicas
from ckptfix.pieces.joining import Joiner, Piece
from ckptfix.tree import compare
from ckptfix.tree.document import OrderedMap, Tensor
from ckptfix.words import listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.match.target import Target
    from ckptfix.report import Spec
    from ckptfix.tree.document import Document, Node


def made_for(document: Document, states: Sequence[StateDict], wanted: Target) -> list[StateDict]:
    """State dicts with the tensors that the shapes of a target make of them."""
    told = [
        flat.Wanted(
            wanted.name, wanted.specs_for(one), wanted.buffers, wanted.ties, wanted.in_order
        )
        for one in states
    ]
    split = [flat.split(*pair) for pair in zip(states, told, strict=True)]
    if not document.slices:
        return split
    ranks = _ranks(document)
    return [_Slices(state, ranks, wanted).joined() for state in split]


def refusal(document: Document, state: StateDict, *, fits: bool) -> UnsupportedError | None:
    """Why a state dict does not fit, where it is for what could not be made of its files."""
    unmade = {} if fits else state.unmade
    if not unmade:
        return None
    key, why = next(iter(unmade.items()))
    more = f" (so are {len(unmade) - 1} more)" if len(unmade) > 1 else ""
    if document.slices:
        see = command("inspect", *document.slices[:2])
        hint = Hint("join it in the program that knows how it was cut; see what is there", see)
        what = f"{key} cannot be joined: {why}{more}"
        return UnsupportedError(what, where=document.name, hint=hint, code="tensor-parallel")
    return UnsupportedError(
        f"{key} cannot be split into parameters: {why}{more}",
        where=document.name,
        hint=Hint(
            "name the very model that was trained",
            fixing_for_a_model(document),
        ),
        code="flat-parameters",
    )


# --- the files of ranks


class _Rank(NamedTuple):
    """What one file holds, by the paths of its state dicts."""

    name: str
    document: Document
    states: Mapping[str, StateDict]


def _ranks(document: Document) -> list[_Rank]:
    """Every file of which a document is one, in the order of their ranks."""
    _check_all_there(document)
    found = []
    for name in document.slices:
        read = door.read(name)
        states = {state.path: state for state in find(read.root)}
        found.append(_Rank(Place(name).base, read, states))
    if len({rank.document.byteorder for rank in found}) > 1:
        raise UnsupportedError("its files differ in byte order", where=document.name)
    _check_one_save(found, document)
    return found


def _check_all_there(document: Document) -> None:
    there = {tensor_parallel.rank_of(Place(name).base) for name in document.slices}
    root = document.root if isinstance(document.root, dict) else {}
    told = root.get("mp_world_size")
    last = max(there) + 1
    world = max(told if type(told) is int else 0, last)
    absent = [str(rank) for rank in range(min(world, last + _MOST_ABSENT)) if rank not in there]
    if absent:
        raise DamagedError(
            f"the files of {len(absent)} of {world} ranks are not there: {listed(absent)}",
            where=document.name,
            hint=Hint(
                "copy or download them too; see what is there",
                shell("ls", files=[Place(document.slices[0]).folder.name]),
            ),
            code="piece-missing",
        )
    if len(there) < len(document.slices):
        names = listed(Place(name).base for name in document.slices)
        raise UnsafeError(
            f"two files are of one rank: {names}",
            where=document.name,
            hint=Hint(
                "keep one of them; see what is there",
                shell("ls", files=[Place(document.slices[0]).folder.name]),
            ),
        )


_MOST_ABSENT = 20


def _check_one_save(ranks: list[_Rank], document: Document) -> None:
    """Refuse files of different steps: numbers and texts beside the weights tell."""
    roots = [rank.document.root for rank in ranks if isinstance(rank.document.root, dict)]
    for key, value in (roots[0] if len(roots) == len(ranks) else {}).items():
        if type(value) not in (int, float, str) or "rank" in str(key).lower():
            continue
        for rank, root in zip(ranks, roots, strict=True):
            if key in root and root[key] != value and type(root[key]) is type(value):
                raise UnsafeError(
                    f"{key} is {value!r} in {ranks[0].name}, and {root[key]!r} in {rank.name}",
                    where=document.name,
                    hint=Hint(
                        "take the files of one save only; see what is in them",
                        command("inspect", *document.slices[:1], rank.document.name),
                    ),
                    code="ranks-differ",
                )


# --- one state dict of all


class _NotJoinedError(Exception):
    """Shapes do not say how slices are joined, and why."""


class _Slices:
    """One state dict, of which each rank has slices, held against one target."""

    def __init__(self, state: StateDict, ranks: list[_Rank], wanted: Target) -> None:
        self.state, self.ranks = state, ranks
        self.specs = wanted.specs
        self.wanted = {flat.bare(key): key for key in wanted.specs}
        first, *others = self.wanted or [()]
        self.shared = first[:-1]
        for path in others:
            while path[: len(self.shared)] != self.shared:
                self.shared = self.shared[:-1]
        self.modules: dict[flat.Path, list[tuple[flat.Path, str]]] = {}
        for path, key in self.wanted.items():
            self.modules.setdefault(path[:-2], []).append((path, key))
        self.joiner = Joiner()
        self.done: dict[str, list[str]] = {}

    def joined(self) -> StateDict:
        """The state dict with its slices joined, and what was done; what cannot be is left out."""
        mapping, unmade = OrderedMap(), dict(self.state.unmade)
        if isinstance(self.state.mapping, OrderedMap):
            mapping.attributes = self.state.mapping.attributes
        held = {rank.name: self._of(rank) for rank in self.ranks}
        for key in dict.fromkeys(key for one in held.values() for key in one):
            nodes = {name: one[key] for name, one in held.items() if key in one}
            first = next(iter(nodes.values()))
            name = self._name(key)
            spec = self.specs[name] if name is not None else None
            if name is None or spec is None or spec.shape is None:
                mapping[key] = first
                continue
            try:
                mapping[key] = self._one(key, name, spec, nodes)
            except _NotJoinedError as error:
                unmade[key] = str(error)
        of = f"of {len(self.ranks)} ranks"
        made = [
            Made("tensor-parallel", f"{_patterns(keys)}: slices {of}", how)
            for how, keys in sorted(self.done.items())
        ]
        return replace(
            self.state,
            mapping=mapping,
            origin=self.state.node,
            made=(*self.state.made, *made),
            unmade=unmade,
        )

    def _of(self, rank: _Rank) -> Mapping[str, Node]:
        """What a rank has of the state dict."""
        found = rank.states.get(self.state.path)
        if found is None:
            raise UnsupportedError(
                f"has no state dict at {self.state.path}",
                where=rank.document.name,
                hint=Hint("see what it holds", command("inspect", rank.document.name)),
            )
        return found.mapping

    def _name(self, key: str) -> str | None:
        """What the target calls a key, whatever is before it in the file or in the target."""
        path = flat.bare(key)
        for depth in range(len(path)):
            if path[depth:] in self.wanted:
                return self.wanted[path[depth:]]
        ways = (self.shared[:depth] + path for depth in range(1, len(self.shared) + 1))
        return next((self.wanted[way] for way in ways if way in self.wanted), None)

    def _one(self, key: str, name: str, spec: Spec, nodes: Mapping[str, Node]) -> Node:
        """The tensor of which each rank has a slice, or all."""
        shape = spec.shape or ()
        tensors = {rank: as_tensor(node) for rank, node in nodes.items()}
        (first, one), *others = tensors.items()
        if any(tensor is None for tensor in tensors.values()):
            if any(compare.difference(nodes[first], node) for node in nodes.values()):
                raise _NotJoinedError("it is no dense tensor, and differs among the files")
            return nodes[first]
        found = {rank: tensor for rank, tensor in tensors.items() if tensor is not None}
        if len({tensor.dtype.name for tensor in found.values()}) > 1:
            raise _NotJoinedError("its dtypes differ among the files")
        if all(tensor.shape == shape for tensor in found.values()):
            for rank, tensor in others:
                if one is None or tensor is None or not replicas.equal(one, tensor):
                    raise _NotJoinedError(f"it is whole in {first} and {rank}, and differs")
            how = "the same in all" if others else "whole in one"
            self.done.setdefault(how, []).append(key)
            return nodes[first]
        along = self._dimension(key, name, shape, found)
        self.done.setdefault(f"joined along dimension {along}", []).append(key)
        pieces = _pieces(found, along)
        return self.joiner.join(key, pieces[0].tensor.dtype, shape, pieces)

    def _dimension(
        self, key: str, name: str, shape: tuple[int, ...], found: Mapping[str, Tensor]
    ) -> int:
        """The only dimension along which slices add up to a shape."""
        sizes = [tensor.shape for tensor in found.values()]
        said = ", ".join(dict.fromkeys(str(list(size)) for size in sizes))
        if any(len(size) != len(shape) for size in sizes):
            raise _NotJoinedError(f"its slices {said} are not of the shape {list(shape)}")
        differ = [d for d in range(len(shape)) if any(size[d] != shape[d] for size in sizes)]
        if len(differ) != 1 or sum(size[differ[0]] for size in sizes) != shape[differ[0]]:
            raise _NotJoinedError(
                f"its slices {said} do not add up to {list(shape)} along one dimension"
            )
        absent = [rank.name for rank in self.ranks if rank.name not in found]
        if absent:
            raise _NotJoinedError(f"it is not in {listed(absent)}")
        fused = self._fused(name, shape, differ[0])
        if fused:
            raise _NotJoinedError(f"{fused}, and slices of each may lie side by side")
        return differ[0]

    def _fused(self, name: str, shape: tuple[int, ...], along: int) -> str:
        """Why a tensor may be several in one; empty where nothing says so."""
        parts = flat.bare(name)
        if any(_FUSED.search(part) for part in parts[-3:]):
            return f"by its name {name} it is several matrices in one"
        if len(shape) != 2:
            pair = (*parts[:-1], "weight")
            weight = self.specs.get(self.wanted.get(pair, ""))
            if parts[-1] == "weight" or weight is None or len(weight.shape or ()) != 2:
                return ""
            return self._fused(self.wanted[pair], weight.shape or (), 0)
        other = 1 - along
        inside = [
            spec.shape
            for path, key in self.modules.get(parts[:-2], ())
            if path != parts and (spec := self.specs[key]).shape and len(spec.shape) == 2
        ]
        taken = [size[other] for size in inside if size[along] == shape[other]]
        for times in (2, 3):
            if shape[along] not in taken and any(shape[along] == times * size for size in taken):
                return f"it is {times} times as large as what takes it in"
        return ""


_FUSED = re.compile(
    r"(?i)qkv|query_key|key_value|^kv_proj|c_attn|in_proj|gate_?(?:and_)?up|up_?gate|w13|w1_w3|wi_fused"
)
"""Names of matrices that are several in one."""


def _pieces(found: Mapping[str, Tensor], along: int) -> list[Piece]:
    """Slices where they lie in the whole."""
    pieces, begin = [], 0
    for tensor in found.values():
        offset = tuple(begin if d == along else 0 for d in range(len(tensor.shape)))
        pieces.append(Piece(offset, tensor))
        begin += tensor.shape[along]
    return pieces


def _patterns(keys: Sequence[str]) -> str:
    """Keys for people: those that differ in numbers alone are one."""
    return listed(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key in keys), 20)

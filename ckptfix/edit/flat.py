"""Flat parameters of FSDP1, split into the parameters that lie in them one after another.

Each module that FSDP1 wraps has one vector, `_flat_param` (`flat_param` up to torch 1.13), of all
parameters below it that no wrapped module further in has, in the order of `named_parameters`; a
parameter with two names is in it once. Neither names nor shapes are in the files, so they are taken
from a target, and only where they add up to the vector.

With `use_orig_params=True` the parameters have their own names too, as parts of the vector; their
shapes alone are not there. A rank's file has its part of each, which `layouts.ranks` joins. In a
folder of DCP those parts were taken for tensors that all ranks share, and one rank's was kept: they
are worth nothing, and the vector is split. torch 2.1 and later begin each parameter at a multiple
of 16 bytes of the dtype that is computed in, and pad the end; the padding is 42, which is read.

Source: `torch.distributed.fsdp._flat_param` and `._state_dict_utils` (1.12 to 2.13).
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.bytes.span import cut
from ckptfix.contents.state_dicts import Made, StateDict
from ckptfix.door import fixing_for_a_model
from ckptfix.edit.compacting import checked
from ckptfix.errors import UnsupportedError
from ckptfix.hints import Hint
from ckptfix.keys import wrappers
from ckptfix.tree.document import OrderedMap, Storage, Tensor, contiguous_stride
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from ckptfix.report import Spec
    from ckptfix.tree.document import Document, Node

Path = tuple[str, ...]
"""A key by its components, without the names of wrappers."""

_NAMES = ("_flat_param", "flat_param")
_ALIGNMENTS = (1, 2, 4, 8, 16)
"""Elements at a multiple of which a parameter may begin: 16 bytes, by dtype; 1: wherever it is."""
_PADDING = {"float64": "d", "float32": "f", "float16": "e"}
_COUNTED = ("running_mean", "running_var", "num_batches_tracked")


class Wanted(NamedTuple):
    """What a target says of the parameters that it has."""

    name: str
    specs: Mapping[str, Spec]
    buffers: Collection[str]
    ties: Iterable[Sequence[str]]
    in_order: bool
    """Whether its keys are known to be in the order of its modules."""


def flat_in(mapping: Mapping[str, Node]) -> list[str]:
    """The keys of a state dict that are flat parameters."""
    return [
        key
        for key, node in mapping.items()
        if key.rpartition(".")[2] in _NAMES and type(node) is Tensor and len(node.shape) == 1
    ]


def refuse(document: Document, keys: Sequence[str]) -> UnsupportedError:
    """The refusal to write flat parameters as they are."""
    return UnsupportedError(
        f"parameters lie flat in {listed(keys)}: their shapes are not in the files",
        where=document.name,
        hint=which_model(document),
        code="flat-parameters",
    )


def which_model(document: Document) -> Hint:
    """The hint that only a target has the shapes."""
    what = "say which model it is for, or which checkpoint has its shapes (--like)"
    return Hint(what, fixing_for_a_model(document))


def split(state: StateDict, wanted: Wanted) -> StateDict:
    """The state dict with the parameters of a target in the place of flat ones.

    Where they do not add up, it is as it was, but that `unmade` says why.
    """
    keys = flat_in(state.mapping)
    return _Splitting(state, keys, wanted).result() if keys else state


class _Unit(NamedTuple):
    """One vector: its key, the module that it is of, and what has a name of its own in it."""

    key: str
    path: Path
    vector: Tensor
    named: Mapping[Path, Tensor]


class _Place(NamedTuple):
    """Where a parameter lies in a vector."""

    path: Path
    spec: Spec
    offset: int


class _UnsplitError(Exception):
    """A vector cannot be split, and why."""


class _Splitting:
    """One state dict, held against one target."""

    def __init__(self, state: StateDict, keys: list[str], wanted: Wanted) -> None:
        self.state, self.keys, self.wanted = state, keys, wanted
        self.there: dict[Path, str] = {}
        for key in state.mapping:
            self.there.setdefault(bare(key), key)
        self.order: dict[Path, int] = {}
        """Where a key of the target stands among them."""
        self.again: set[str] = set()
        """Keys of further names of parameters, whose tensors are of one rank."""
        self.units = {unit.path: unit for unit in map(self._unit, keys)}

    def _unit(self, key: str) -> _Unit:
        vector = self.state.tensors[key]
        named = {
            bare(other): tensor
            for other, tensor in self.state.tensors.items()
            if tensor.storage is vector.storage and other != key
        }
        return _Unit(key, bare(key)[:-1], vector, named)

    def result(self) -> StateDict:
        """The state dict, split where that can be."""
        places: dict[Path, list[_Place]] = {}
        reasons: dict[str, str] = {}
        for removed, added in self._ways():
            found, failed = self._split(removed, added)
            if found and not failed and not places.keys() & found.keys():
                places |= found
                for key in self.wanted.specs:
                    path = (*removed, *bare(key)[len(added) :])
                    self.order.setdefault(path, len(self.order))
            elif len(failed) > len(reasons):
                reasons = failed
        if not places and not reasons:
            return self.state
        if not places:
            return replace(self.state, unmade=reasons, origin=self.state.node)
        return self._made(places)

    def _ways(self) -> Iterator[tuple[Path, Path]]:
        """What the keys have before those of the target, or lack; as they are comes first."""
        again = {key for keys in self.wanted.ties for key in keys[1:]}.union(self.wanted.buffers)
        total = sum(spec.numel for key, spec in self.wanted.specs.items() if key not in again)
        own = sum(t.numel for key, t in self.state.tensors.items() if key not in self.keys)
        below: dict[Path, int] = {(): 0}
        for unit in self.units.values():
            for depth in range(len(unit.path) + 1):
                before = unit.path[:depth]
                below[before] = below.get(before, 0) + unit.vector.numel
        for removed in sorted(below, key=len):
            if not removed or below[removed] + own >= total:
                yield removed, ()
        first, *others = [bare(key) for key in self.wanted.specs] or [()]
        shared = len(first) - 1
        for other in others:
            while first[:shared] != other[:shared]:
                shared -= 1
        for depth in range(1, shared + 1):
            yield (), first[:depth]

    def _split(self, removed: Path, added: Path) -> tuple[dict[Path, list[_Place]], dict[str, str]]:
        """Where each parameter of the target lies, by unit; and of which units that is not known.

        The keys are those of the target after `removed`, which is before them, and without `added`.
        """
        members: dict[Path, list[tuple[Path, str]]] = {}
        for key in self.wanted.specs:
            path = bare(key)
            if path[: len(added)] != added:
                continue
            path = (*removed, *path[len(added) :])
            depth = next(
                (d for d in range(len(path), len(removed) - 1, -1) if path[:d] in self.units), None
            )
            if depth is not None:
                members.setdefault(path[:depth], []).append((path, key))
            elif path not in self.there and key not in self.wanted.buffers:
                return {}, {}
        found: dict[Path, list[_Place]] = {}
        failed: dict[str, str] = {}
        for path, inside in members.items():
            unit = self.units[path]
            try:
                found[path] = self._named(unit, inside) if unit.named else self._laid(unit, inside)
            except _UnsplitError as error:
                failed[unit.key] = str(error)
        return {path: places for path, places in found.items() if places}, failed

    def _named(self, unit: _Unit, inside: list[tuple[Path, str]]) -> list[_Place]:
        """The parameters that have their own names: their shapes alone are the target's."""
        places = []
        for path, key in inside:
            part, spec = unit.named.get(path), self.wanted.specs[key]
            if part is None:
                continue
            if spec.shape is None or spec.numel != part.numel:
                raise _UnsplitError(
                    f"its parameter {'.'.join(path)} has {plural(part.numel, 'element')}, "
                    f"that of {self.wanted.name} {_shape(spec)}"
                )
            places.append(_Place(path, spec, part.offset))
        return places

    def _laid(self, unit: _Unit, inside: list[tuple[Path, str]]) -> list[_Place]:
        """The parameters in the order of the target, where they add up to the vector."""
        found: dict[tuple[_Place, ...], None] = {}
        most = 0
        for several, steps in self._candidates(unit, inside):
            most = max(most, sum(spec.numel for _, spec in several))
            for step in steps:
                places, end = _laid_out(several, step)
                if places and _fits(unit.vector, places, end, step):
                    found[tuple(places)] = None
        if not most:
            return []  # the target has none of them
        if not found:
            raise _UnsplitError(
                f"it has {plural(unit.vector.numel, 'element')}, the parameters of "
                f"{self.wanted.name} there have {most:,}"
            )
        if len(found) > 1:
            raise _UnsplitError("its parameters could lie in it in several ways")
        places = list(*found)
        self._check_order([place.path for place in places])
        self._note_again({place.path for place in places}, inside)
        return places

    def _check_order(self, names: list[Path]) -> None:
        """Refuse an order that may not be that of the modules."""
        if len(names) > 1 and not self.wanted.in_order and names == sorted(names):
            raise _UnsplitError(
                f"{self.wanted.name} has its keys sorted by name, and not in the order of the "
                "modules, which a model has"
            )

    def _note_again(self, names: set[Path], inside: list[tuple[Path, str]]) -> None:
        """Note further names of parameters, where DCP kept a tensor of one rank under each."""
        if not names.isdisjoint(self.there):
            tied = {key for keys in self.wanted.ties for key in keys}
            rest = (path for path, key in inside if key in tied and path not in names)
            self.again.update(self.there[path] for path in rest if path in self.there)

    def _candidates(
        self, unit: _Unit, inside: list[tuple[Path, str]]
    ) -> Iterator[tuple[list[tuple[Path, Spec]], Sequence[int]]]:
        """Which of the target's keys may be in a vector, and at which multiples they may begin."""
        kept = [
            (path, key)
            for path, key in inside
            if key not in self.wanted.buffers and not key.endswith("_extra_state")
        ]
        absent = [row for row in kept if row[0] not in self.there]
        for rows in _once(absent, self.wanted.ties):
            yield self._specs(rows), (1,)
        if len(absent) < len(kept):  # as DCP keeps what has its own name
            rows = [row for row in kept if not row[1].endswith(_COUNTED)]
            for some in _once(rows, self.wanted.ties):
                yield self._specs(some), _ALIGNMENTS

    def _specs(self, rows: list[tuple[Path, str]]) -> list[tuple[Path, Spec]]:
        specs = [(path, self.wanted.specs[key]) for path, key in rows]
        return [] if any(spec.shape is None for _, spec in specs) else specs

    def _made(self, places: dict[Path, list[_Place]]) -> StateDict:
        """The state dict, in which parameters stand where their vector did."""
        gone = {self.units[path].key: path for path in places}
        made = {
            place.path: _parameter(self.units[path].vector, checked_, place)
            for path, several in places.items()
            for checked_ in [checked(self.units[path].vector.storage)]
            for place in several
        }
        mapping: dict[str, Node] = {}
        for key, node in self.state.mapping.items():
            if key in gone:
                for place in places[gone[key]]:
                    old = self.there.get(place.path)
                    mapping.setdefault(old or ".".join(place.path), made[place.path])
            elif key not in self.again:
                mapping[key] = made.get(bare(key), node)
        last = len(self.order)
        rows = sorted(mapping.items(), key=lambda row: self.order.get(bare(row[0]), last))
        whole = OrderedMap(rows)
        if isinstance(self.state.mapping, OrderedMap):
            whole.attributes = self.state.mapping.attributes
        count = plural(sum(map(len, places.values())), "parameter")
        order = "" if self.wanted.in_order else f", in the order of {self.wanted.name}"
        what = Made(
            "flat-parameters",
            f"parameters lie flat in {listed(gone)}",
            f"split into {count}{order}",
        )
        unmade = {key: "the target has none of it" for key in self.keys if key not in gone}
        return replace(
            self.state, mapping=whole, origin=self.state.node, made=(what,), unmade=unmade
        )


def bare(key: str) -> Path:
    """The components of a key without the names that wrappers add anywhere."""
    return tuple(part for part in key.split(".") if part not in wrappers.ANYWHERE)


def _shape(spec: Spec) -> str:
    return "no shape" if spec.shape is None else f"the shape {list(spec.shape)}"


def _once(
    rows: list[tuple[Path, str]], ties: Iterable[Sequence[str]]
) -> Iterator[list[tuple[Path, str]]]:
    """Keys without those that name a parameter again; without any that is tied to another."""
    first = {key: keys[0] for keys in ties for key in keys}
    seen: set[str] = set()
    within = []
    for path, key in rows:
        if first.get(key, key) not in seen:
            within.append((path, key))
        seen.add(first.get(key, key))
    yield within
    outside = [(path, key) for path, key in within if first.get(key, key) == key]
    if len(outside) < len(within):
        yield outside


def _laid_out(several: list[tuple[Path, Spec]], step: int) -> tuple[list[_Place], int]:
    """Where parameters lie that begin at multiples of `step`, and where the last one ends."""
    places, end = [], 0
    for path, spec in several:
        begin = -(-end // step) * step
        places.append(_Place(path, spec, begin))
        end = begin + spec.numel
    return places, end


def _fits(vector: Tensor, places: list[_Place], end: int, step: int) -> bool:
    """Whether parameters fill a vector, but for padding where they begin at multiples."""
    if step == 1:
        return end == vector.numel
    return end <= vector.numel and _is_padded(vector, places)


def _is_padded(vector: Tensor, places: list[_Place]) -> bool:
    """Whether what lies between parameters and after them is padding."""
    end = 0
    last = _Place((), places[-1].spec._replace(shape=(0,)), vector.numel)
    for place in [*places, last]:
        if place.offset > end and not _is_padding(vector, end, place.offset):
            return False
        end = place.offset + place.spec.numel
    return True


def _is_padding(vector: Tensor, begin: int, end: int) -> bool:
    """Whether all elements of a stretch of a vector are 42."""
    size = vector.dtype.itemsize
    code = _PADDING.get(vector.dtype.name)
    wanted = struct.pack("<f", 42.0)[2:] if code is None else struct.pack(f"<{code}", 42.0)
    if len(wanted) != size or end - begin > _MOST_PADDING:
        return False
    found = cut(vector.storage.spans, (vector.offset + begin) * size, (end - begin) * size)
    data = b"".join(span.read() for span in found)
    return data in (wanted * (end - begin), wanted[::-1] * (end - begin))


_MOST_PADDING = 1 << 16


def _parameter(vector: Tensor, storage: Storage, place: _Place) -> Tensor:
    """A parameter in a storage of its own, whose bytes are its part of the vector."""
    shape, size = place.spec.shape or (), vector.dtype.itemsize
    begin = (vector.offset + place.offset) * size
    spans = cut(storage.spans, begin, place.spec.numel * size)
    own = Storage(vector.dtype, place.spec.numel, storage.device, spans, ".".join(place.path))
    return Tensor(own, vector.dtype, shape, contiguous_stride(shape))

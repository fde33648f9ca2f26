"""Two documents held against each other: keys, shapes, dtypes, values, and everything else.

State dicts are paired by path; where no path is in both, the one that is meant in each. Keys that
differ are paired where one stripped or added prefix turns one side's into the other's, then where
exactly the same tensor stands under another name. Only tensors whose bytes differ are decoded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.specs import specs
from ckptfix.contents.state_dicts import choose, choose_all, find, of_models
from ckptfix.contents.tensors import as_tensor
from ckptfix.diffs.values import Distance, Side, checksum, distance, same_bytes
from ckptfix.edit import reduce
from ckptfix.keys import prefixes
from ckptfix.keys.renaming import Renaming, unchanged
from ckptfix.report import Difference, Spec
from ckptfix.tree import document
from ckptfix.tree.document import Global, Inert, Node, Storage, Tensor
from ckptfix.tree.walk import PATH_DEPTH, children
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping

    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.tree.document import Document

    Same = Callable[[Tensor, Tensor], bool]


class ValueDifference(NamedTuple):
    """One tensor whose values differ; `other` is its key in the second document."""

    key: str
    other: str
    numel: int
    distance: Distance


class OtherDifference(NamedTuple):
    """What is not a tensor of a state dict, as text; None: it is not there."""

    path: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class StateDiff:
    """How two state dicts differ. In each `Difference`, `found` is the first one's."""

    a: str
    b: str
    """Their paths."""
    removed: dict[str, Spec]
    """Keys that only the first has."""
    added: dict[str, Spec]
    """Keys that only the second has."""
    renamed: dict[str, str]
    """Keys of the first that have another name in the second."""
    label: str
    """What was renamed, where one prefix tells it: `removed module.`"""
    shapes: list[Difference]
    dtypes: list[Difference]
    values: list[ValueDifference]
    equal: int
    """Keys that hold the same in both, whatever they are called there: the same shape and dtype
    and, unless only keys were compared, value."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        found = (self.removed, self.added, self.renamed, self.shapes, self.dtypes, self.values)
        return not any(found)

    @property
    def counts(self) -> dict[str, int]:
        """How many keys differ in each way, by what is said of it; a key may differ in several."""
        return {
            "only in A": len(self.removed),
            "only in B": len(self.added),
            "renamed": len(self.renamed),
            "of another shape": len(self.shapes),
            "of another dtype": len(self.dtypes),
            "of other values": len(self.values),
        }

    def summary(self, *, keys_only: bool = False) -> str:
        """The numbers in one line, for people."""
        path = "" if self.a == self.b == "/" else f"{self.a}: "
        alike = "alike, values not compared" if keys_only else "equal"
        parts = [f"{count:,} {what}" for what, count in self.counts.items() if count]
        return path + ", ".join([f"{plural(self.equal, 'key')} {alike}", *parts])


@dataclass(frozen=True, slots=True)
class Diff:
    """How two checkpoints differ."""

    a: str
    b: str
    """What they are called."""
    state_dicts: list[StateDiff]
    others: list[OtherDifference]
    keys_only: bool = False

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.others and all(state.same for state in self.state_dicts)

    @property
    def summary(self) -> list[str]:
        """The numbers, a line for each pair of state dicts and one for what lies beside them."""
        lines = [state.summary(keys_only=self.keys_only) for state in self.state_dicts]
        return [*lines, *([plural(len(self.others), "other difference")] if self.others else [])]


@dataclass(frozen=True, slots=True)
class _Comparer:
    """What is known about both documents while they are compared."""

    a: Document
    b: Document
    keys_only: bool
    read_data: bool
    progress: Callable[[int], None] | None

    def side_a(self, tensor: Tensor) -> Side:
        return Side(tensor, self.a.byteorder)

    def side_b(self, tensor: Tensor) -> Side:
        return Side(tensor, self.b.byteorder)

    def distance(self, one: Tensor, other: Tensor) -> Distance | None:
        """How far apart two tensors of one shape are; None where they are equal."""
        ours, theirs = self.side_a(one), self.side_b(other)
        alike = one.dtype is other.dtype
        same = same_bytes(ours, theirs, read_data=self.read_data) if alike else None
        if self.progress is not None:
            self.progress(one.nbytes)
        if same:
            return None
        found = distance(ours, theirs)
        return None if same is None and found.in_bits_only else found

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors are equal in shape, dtype and value."""
        specs_equal = (one.shape, one.dtype) == (other.shape, other.dtype)
        return specs_equal and self.distance(one, other) is None


def diff(
    a: Document,
    b: Document,
    *,
    select: tuple[str, str] | None = None,
    keys_only: bool = False,
    read_data: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """How two documents differ.

    With `select`, a path in each, only those two state dicts are compared; with `keys_only`, only
    keys, shapes and dtypes of state dicts. Checksums on record are believed unless `read_data` is
    set. `progress` is told the bytes of each tensor that was compared.

    Raises:
        SelectionError: there is no such state dict, or several could be meant.
        ReadError: a tensor cannot be read.
    """
    comparer = _Comparer(a, b, keys_only, read_data, progress)
    pairs = _pairs(a, b, select)
    others: list[OtherDifference] = []
    states = [_state_diff(comparer, *pair, others) for pair in pairs]
    if not keys_only and select is None:
        others += _outside(a, b, pairs, comparer.same)
    return Diff(a.name, b.name, states, others, keys_only)


def _pairs(
    a: Document, b: Document, select: tuple[str, str] | None
) -> list[tuple[StateDict, StateDict]]:
    if select is not None:
        return [(choose_all(a, [select[0]])[0], choose_all(b, [select[1]])[0])]
    ours, theirs = ({s.path: s for s in of_models(find(d.root))} for d in (a, b))
    common = [(state, theirs[path]) for path, state in ours.items() if path in theirs]
    return common or ([(choose(a), choose(b))] if ours and theirs else [])


# --- state dicts


def _state_diff(
    comparer: _Comparer, a: StateDict, b: StateDict, others: list[OtherDifference]
) -> StateDiff:
    """How two state dicts differ; what differs and is no dense tensor goes to `others`."""
    ours, theirs = specs(a.mapping), specs(b.mapping)
    pairs, label = _paired(comparer, a, b)
    taken = set(pairs.values())
    rows = [Difference(key, ours[key], theirs[other]) for key, other in pairs.items()]
    shapes = [row for row in rows if row.found.shape != row.wanted.shape]
    unlike = {row.key for row in shapes}
    dtypes = [r for r in rows if r.key not in unlike and r.found.dtype != r.wanted.dtype]
    comparable = {key: other for key, other in pairs.items() if key not in unlike}
    values = [] if comparer.keys_only else list(_values(comparer, a, b, comparable))
    different = unlike.union((row.key for row in dtypes), (row.key for row in values))
    if not comparer.keys_only:
        for key, other in pairs.items():
            if key not in different and not (key in a.tensors and other in b.tensors):
                found = list(_not_dense(key, a, other, b, comparer.same))
                different.update([key] if found else [])
                others += found
        others += _versions(a, b, pairs, comparer.same)
    return StateDiff(
        a.path,
        b.path,
        {key: spec for key, spec in ours.items() if key not in pairs},
        {key: spec for key, spec in theirs.items() if key not in taken},
        {key: other for key, other in pairs.items() if key != other},
        label,
        shapes,
        dtypes,
        values,
        sum(key not in different for key in pairs),
    )


def _values(
    comparer: _Comparer, a: StateDict, b: StateDict, pairs: Mapping[str, str]
) -> Iterator[ValueDifference]:
    known: dict[Hashable, Distance | None] = {}  # tied tensors are compared once
    for key, other in pairs.items():
        one, two = a.tensors.get(key), b.tensors.get(other)
        if one is None or two is None:
            continue
        views = one.view, two.view
        if views not in known:
            known[views] = comparer.distance(one, two)
        found = known[views]
        if found is not None:
            yield ValueDifference(key, other, one.numel, found)


def _paired(comparer: _Comparer, a: StateDict, b: StateDict) -> tuple[dict[str, str], str]:
    """Which key of the second each key of the first is, in order; and what that renames."""
    ours, theirs = list(a.mapping), set(b.mapping)
    renaming = _renaming(a, b)
    pairs = {key: new for key, new in renaming.keys.items() if new in theirs}
    label = renaming.label if any(key != new for key, new in pairs.items()) else ""
    if not comparer.keys_only:
        taken = set(pairs.values())
        left = [key for key in a.tensors if key not in pairs]
        right = [key for key in b.tensors if key not in taken]
        pairs.update(_by_content(comparer, a, b, left, right))
    return {key: pairs[key] for key in ours if key in pairs}, label


def _renaming(a: StateDict, b: StateDict) -> Renaming:
    """The one way to strip or add prefixes that makes most keys of the first the second's."""
    ways = prefixes.fits(a.mapping, b.mapping) or prefixes.nearest(a.mapping, b.mapping)
    if len(ways) == 1:
        return ways[0]
    ours, theirs = specs(a.mapping), specs(b.mapping)
    scores = [sum(theirs.get(new) == ours[key] for key, new in way.keys.items()) for way in ways]
    best = [way for way, score in zip(ways, scores, strict=True) if score == max(scores)]
    return best[0] if len(best) == 1 else unchanged(a.mapping)


def _by_content(
    comparer: _Comparer, a: StateDict, b: StateDict, left: list[str], right: list[str]
) -> Iterator[tuple[str, str]]:
    """Keys under which the same tensor stands: equal shape, dtype and bytes.

    Where several stand for one, as zeros do, they are paired in order if both have as many.
    """
    shared = {_spec(a.tensors[key]) for key in left} & {_spec(b.tensors[key]) for key in right}
    ours = _by_checksum(left, a.tensors, shared, comparer.side_a)
    theirs = _by_checksum(right, b.tensors, shared, comparer.side_b)
    for known, keys in ours.items():
        others = theirs.get(known, [])
        if len(others) == len(keys):
            yield from zip(keys, others, strict=True)


def _spec(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


def _by_checksum(
    keys: Iterable[str],
    tensors: Mapping[str, Tensor],
    specs_: Collection[tuple[object, ...]],
    side: Callable[[Tensor], Side],
) -> dict[Hashable, list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for key in keys:
        spec = _spec(tensors[key])
        total = checksum(side(tensors[key])) if spec in specs_ else None
        if total is not None:
            groups.setdefault((spec, total), []).append(key)
    return groups


# --- everything else


def _not_dense(
    key: str, a: StateDict, other: str, b: StateDict, same: Same
) -> Iterator[OtherDifference]:
    """What differs under a key that has no dense tensor on both sides: extra state, a number."""
    yield from _unlike(_below(a, key), a.mapping[key], b.mapping[other], same)


def _versions(
    a: StateDict, b: StateDict, pairs: Mapping[str, str], same: Same
) -> Iterator[OtherDifference]:
    """What differs in `_metadata`, where no key was renamed."""
    if None not in (a.metadata, b.metadata) and all(key == pairs[key] for key in pairs):
        yield from _unlike(_below(a, "_metadata"), a.metadata, b.metadata, same)


def _below(state: StateDict, key: str) -> str:
    return key if state.path == "/" else f"{state.path}/{key}"


def _outside(
    a: Document, b: Document, pairs: list[tuple[StateDict, StateDict]], same: Same
) -> Iterator[OtherDifference]:
    """What differs outside the state dicts that were compared."""
    apart = {id(state.node) for pair in pairs for state in pair}
    roots = [id(root) in apart for root in (a.root, b.root)]
    if not any(roots):
        yield from _unlike("", a.root, b.root, same, apart)
    elif not all(roots):  # a bare state dict, and one among other things
        state, document = (pairs[0][1], b) if roots[0] else (pairs[0][0], a)
        for path, kind in reduce.only(document, state).left_out:
            yield OtherDifference(path, *((None, kind) if roots[0] else (kind, None)))


def _unlike(
    path: str, a: Node, b: Node, same: Same, apart: Collection[int] = ()
) -> Iterator[OtherDifference]:
    """Where two trees differ, but for the nodes in `apart`; both are walked at once."""
    seen: set[tuple[int, int]] = set()
    pending: list[tuple[tuple[str, ...], Node, Node]] = [((path,) if path else (), a, b)]
    while pending:
        where, one, other = pending.pop()
        ours, theirs = _parts(one, apart), _parts(other, apart)
        if ours is None or theirs is None or _kind(one) != _kind(other):
            if not _equal(one, other, same):
                yield OtherDifference("/".join(where) or "/", shown(one), shown(other))
            continue
        if (id(one), id(other)) in seen:
            continue
        seen.add((id(one), id(other)))
        below = []
        for name in dict.fromkeys((*ours, *theirs)):
            deeper = (*where, name[0]) if len(where) < PATH_DEPTH else where
            if name in ours and name in theirs:
                below.append((deeper, ours[name], theirs[name]))
            else:
                left, right = (shown(s[name]) if name in s else None for s in (ours, theirs))
                yield OtherDifference("/".join(deeper), left, right)
        pending.extend(reversed(below))


def _parts(node: Node, apart: Collection[int]) -> dict[tuple[str, int], Node] | None:
    """What a container holds by name, the n-th of each name; None for leaves and tensors."""
    if as_tensor(node) is not None or not isinstance(node, (dict, list, tuple, Inert)):
        return None
    if type(node) is Global:
        return None
    counts: Counter[str] = Counter()
    parts = {}
    for name, child in children(node):
        if id(child) not in apart:
            parts[name, counts[name]] = child
        counts[name] += 1
    return parts


def _kind(node: Node) -> str:
    """What has to be equal before two containers are compared part by part."""
    if isinstance(node, Inert):
        return f"{node.how} {node.function}"
    return "dict" if isinstance(node, dict) else type(node).__name__


def _equal(one: Node, other: Node, same: Same) -> bool:
    ours, theirs = as_tensor(one), as_tensor(other)
    if ours is not None and theirs is not None:
        return same(ours, theirs)
    if isinstance(one, Storage) and isinstance(other, Storage):
        flat = (_whole(one), _whole(other))
        return one.dtype is other.dtype and one.numel == other.numel and same(*flat)
    if type(one) is not type(other) or isinstance(one, (Tensor, Storage, Inert, list, dict)):
        return False
    return bool(one == other) or (one != one and other != other)


def _whole(storage: Storage) -> Tensor:
    return Tensor(storage, storage.dtype, (storage.numel,), (1,))


def shown(node: Node) -> str:
    """A node as one short text: a value as Python writes it, anything else by its kind."""
    tensor = as_tensor(node)
    if tensor is not None:
        return f"{tensor.dtype} {list(tensor.shape)}"
    if isinstance(node, (Inert, dict, list, Storage)) or type(node) is tuple:
        return document.kind(node)
    text = repr(node) if not isinstance(node, Global) else str(node)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


_LONGEST = 60

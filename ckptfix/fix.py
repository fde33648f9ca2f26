"""Find what is wrong with a checkpoint, and plan what mends it; nothing is guessed.

Without a target only what is certain is mended: wrappers that every key carries, device tags.
With one (a model, another checkpoint) the state dict that fits is found, renamed as the target has
it, and reduced to what it wants; what is dropped is named. Where two ways fit, where a key is
missing or a shape differs, the plan is refused.
"""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import edits, fitting, wrappers
from ckptfix import target as targets
from ckptfix.compare import describe
from ckptfix.document import Document, Node, OrderedMap
from ckptfix.errors import KeyMismatchError, RenameError, SelectionError
from ckptfix.state_dicts import StateDict, choose, find, of_models
from ckptfix.trees import rebuild

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.compare import Report
    from ckptfix.renaming import Renaming
    from ckptfix.target import Target

_SHOWN = 5


class Cure(NamedTuple):
    """One row of a plan: what was found, where, and what is done about it."""

    code: str
    where: str
    found: str
    cure: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done, and the document that comes of it. Nothing is written yet."""

    document: Document
    cures: list[Cure] = field(default_factory=list)
    renamed: Mapping[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    """Keys of the state dict that the target does not want."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Path and kind of what lies beside the state dict and is not carried along."""


def plan(
    document: Document,
    wanted: Target | None = None,
    *,
    select: str | None = None,
    keep_training_state: bool = False,
) -> Plan:
    """What mends a document, for a target if there is one.

    With `keep_training_state` the weights are mended where they are and everything else stays.

    Raises:
        SelectionError: there is no state dict, or several fit.
        RenameError: the keys fit in two ways, or two would become one.
        KeyMismatchError: a key is missing or a shape differs; carries the report.
    """
    if wanted is None:
        return _on_cpu(_certain(document, select))
    return _on_cpu(_fitting(document, wanted, select, keep_training_state))


def _certain(document: Document, select: str | None) -> Plan:
    """Without the wrappers that every key of a state dict carries."""
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    found = [(state, wrappers.strip(state.mapping)) for state in states if state.origin is None]
    changes = [(state, renaming) for state, renaming in found if renaming.changed]
    cures = [_renaming_cure(state, renaming) for state, renaming in changes]
    renamed = _changed(renaming for _, renaming in changes)
    return Plan(edits.rename(document, changes), cures, renamed)


def _renaming_cure(state: StateDict, renaming: Renaming) -> Cure:
    found = f"{renaming.changed} of {len(renaming.keys)} keys carry other names"
    return Cure("prefix-wrapper", state.path, found, renaming.label)


def _changed(renamings: Iterable[Renaming]) -> dict[str, str]:
    return {old: new for way in renamings for old, new in way.keys.items() if old != new}


def _on_cpu(made: Plan) -> Plan:
    document, tags = edits.to_cpu(made.document)
    if not tags:
        return made
    found = ", ".join(f"{count} storages on {tag}" for tag, count in tags.items())
    cures = [*made.cures, Cure("device-tag", "/", found, "tagged cpu")]
    return replace(made, document=document, cures=cures)


# --- with a target


class _Way(NamedTuple):
    """A state dict, a renaming of it, and how it compares with the target then."""

    state: StateDict
    renaming: Renaming
    report: Report
    tied: Mapping[str, str]
    """Keys that the file lacks, and keys of the target that name the same tensor and are there."""

    @property
    def missing(self) -> list[str]:
        return [key for key in self.report.missing if key not in self.tied]

    @property
    def fits(self) -> bool:
        return not self.missing and not self.report.shape_mismatch


def _fitting(document: Document, wanted: Target, select: str | None, keep: bool) -> Plan:
    way = _only_way(document, wanted, select)
    if not way.fits:
        raise _mismatch(document, way.report, wanted)
    dropped = [old for old, new in way.renaming.keys.items() if new in set(way.report.unexpected)]
    mapping = _mended(way, set(dropped))
    made = Plan(
        _replaced(document, way.state, mapping),
        list(_cures(way, wanted, dropped)),
        _changed([way.renaming]),
        dropped,
    )
    return made if keep else _alone(made, document, way.state, mapping)


def _only_way(document: Document, wanted: Target, select: str | None) -> _Way:
    """The only state dict, and the only renaming of it, that gives the target all it wants.

    Where none does, the one that comes nearest. Averaged copies stand back.
    """
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    states = states or [choose(document)]  # which says that there is none
    ways = [way for state in states for way in _ways(state, wanted)]
    whole = [way for way in ways if way.fits]
    if not whole:
        return max(ways, key=lambda way: way.report.share)
    whole = [way for way in whole if way.state.role != "ema"] or whole
    if len(whole) > 1:
        raise _several(document, whole, wanted)
    return whole[0]


def _ways(state: StateDict, wanted: Target) -> list[_Way]:
    specs = wanted.specs_for(state)
    renamings = fitting.fits(state.mapping, specs) or fitting.nearest(state.mapping, specs)
    ways = []
    for renaming in renamings:
        report = targets.report(state, wanted, renaming)
        there = set(renaming.keys.values())
        tied = {key: _present(key, wanted.ties, there) for key in report.missing}
        found = {key: other for key, other in tied.items() if other is not None}
        ways.append(_Way(state, renaming, report, found))
    return ways


def _present(key: str, ties: Iterable[Iterable[str]], there: set[str]) -> str | None:
    """A key that names the same tensor of the target as `key`, and is there."""
    groups = (group for group in ties if key in group)
    return next((other for group in groups for other in group if other in there), None)


def _cures(way: _Way, wanted: Target, dropped: list[str]) -> Iterable[Cure]:
    if way.renaming.changed:
        yield _renaming_cure(way.state, way.renaming)
    for key, other in way.tied.items():
        yield Cure("tied-tensors", way.state.path, f"{key} is missing", f"tied to {other}")
    if dropped:
        shown = ", ".join(dropped[:_SHOWN]) + (", …" if len(dropped) > _SHOWN else "")
        found = f"{len(dropped)} keys that {wanted.name} does not have: {shown}"
        yield Cure("unexpected-keys", way.state.path, found, "dropped")


def _mended(way: _Way, dropped: set[str]) -> OrderedMap:
    """The state dict under its new keys, without those that are dropped, with its ties."""
    mapping, renaming = way.state.mapping, way.renaming
    items = OrderedMap((renaming.keys[k], node) for k, node in mapping.items() if k not in dropped)
    items.update({key: items[other] for key, other in way.tied.items()})
    if way.state.metadata is not None:
        items.attributes = {"_metadata": OrderedMap(renaming.metadata(way.state.metadata))}
    return items


def _replaced(document: Document, state: StateDict, mapping: OrderedMap) -> Document:
    def change(node: Node) -> Node:
        return mapping if node is state.node else node

    return replace(document, root=rebuild(document.root, change))


def _alone(made: Plan, document: Document, state: StateDict, mapping: OrderedMap) -> Plan:
    """The plan reduced to the state dict, with what lies beside it named."""
    left_out = edits.only(document, state).left_out
    cures = list(made.cures)
    if left_out:
        found = f"the state dict lies in a checkpoint, beside {len(left_out)} other things"
        cures.append(Cure("nested", state.path, found, "taken out"))
    alone = replace(document, root=mapping, extras={})
    return replace(made, document=alone, cures=cures, left_out=left_out)


# --- refusals


def _several(document: Document, ways: list[_Way], wanted: Target) -> SelectionError | RenameError:
    paths = list(dict.fromkeys(way.state.path for way in ways))
    if len(paths) > 1:
        return SelectionError(
            f"{document.name}: {len(paths)} state dicts fit {wanted.name}: {', '.join(paths)}",
            hint=f"choose one: add --select {shlex.quote(paths[0])}",
            code="ambiguous-state-dict",
        )
    labels = "; ".join(way.renaming.label for way in ways)
    return RenameError(
        f"{document.name}: the keys fit {wanted.name} in {len(ways)} ways: {labels}",
        hint="choose one: ckptfix strip-prefix --prefix PREFIX IN OUT, then ckptfix fix OUT …",
        code="ambiguous-prefix",
    )


def _mismatch(document: Document, report: Report, wanted: Target) -> KeyMismatchError:
    message = f"{document.name} cannot be made to fit {wanted.name}\n{describe(report)}"
    inspect = f"see what it holds: ckptfix inspect --all {shlex.quote(document.name)}"
    return KeyMismatchError(report, message, hint=_nearest_name(report) or inspect)


def _nearest_name(report: Report) -> str | None:
    """A suggestion for the first missing key that resembles one that nobody wants."""
    for key in report.missing[:_SHOWN]:
        near = difflib.get_close_matches(key, report.unexpected[:2000], 1, cutoff=0.75)
        if near:
            return f"if {near[0]!r} is meant for {key!r}: ckptfix rename IN OUT --sub RE REPL"
    return None

"""Find what is wrong with a checkpoint, and plan what repairs it; nothing is guessed.

Without a target only what is certain is repaired: wrappers that every key carries, device tags.
Keys that are there with a wrapper's name and without are refused.
With one (a model, another checkpoint) the state dict that fits is found, renamed as the target has
it, and reduced to what it wants; what is dropped is named. Where two ways fit, where a key is
missing or a shape differs, the plan is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents import foreign
from ckptfix.contents.modules import unwrapped
from ckptfix.contents.state_dicts import StateDict, choose, choose_all, find, of_models
from ckptfix.contents.tensors import as_tensor, disguise, is_special_tensor, without_disguise
from ckptfix.diagnose.document import diagnose
from ckptfix.door import fixing_for_a_model
from ckptfix.edit import averages, edits, masks, optimizers, reduce
from ckptfix.edit.dangers import Removed, without_dangers
from ckptfix.errors import KeyCollisionError, UnsupportedError
from ckptfix.findings import CODES, Severity
from ckptfix.hints import Hint
from ckptfix.keys import globs, wrappers
from ckptfix.keys.renaming import Renaming, joined, shared_prefix
from ckptfix.match import transposes
from ckptfix.match.choose import match
from ckptfix.tree.document import Inert, kind
from ckptfix.tree.rebuild import rebuild
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from ckptfix.edit.masks import Applied
    from ckptfix.findings import Finding
    from ckptfix.match.choose import Match
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document, Node, OrderedMap


_WRAPPER = "prefix-wrapper"


class Cure(NamedTuple):
    """One row of a plan: what was found, where, and what is done about it."""

    code: str
    where: str
    found: str
    cure: str


class Remaining(NamedTuple):
    """What a plan leaves as it is: a finding, where it is, and the reason."""

    code: str
    where: str
    found: str
    reason: str

    @property
    def is_error(self) -> bool:
        """Whether what is written does not load, or not rightly, and nobody asked for that."""
        asked = self.code == "dangerous-globals"  # they are left out unless they are to be kept
        return not asked and self.code in CODES and CODES[self.code].severity is Severity.ERROR


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done, and the document that comes of it. Nothing is written yet."""

    document: Document
    cures: list[Cure] = field(default_factory=list)
    renamings: list[tuple[str, Renaming]] = field(default_factory=list)
    """Paths of state dicts, and what becomes of their keys."""
    dropped: list[str] = field(default_factory=list)
    """Keys of the state dict that the target does not want."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Path and kind of what lies beside the state dict and is not carried along."""
    written_once: Mapping[str, str] = field(default_factory=dict)
    """Keys that the container cannot hold beside the one that they are tied to, each with that."""
    untying: int = 0
    """Bytes that it would take to write those keys too."""
    of_another_dtype: list[str] = field(default_factory=list)
    """Keys whose dtype is not the target's: they are left, and torch casts them."""
    remaining: list[Remaining] = field(default_factory=list)
    """What is still wrong, or may be, and why it is left as it is."""
    changes: list[str] = field(default_factory=list)
    """Those of them whose values torch does not merely round, and what becomes of them."""
    unseen: list[str] = field(default_factory=list)
    """Square weights that may be transposed, which does not show."""

    @property
    def keys_renamed(self) -> int:
        """How many keys are renamed: one that several state dicts have counts in each of them."""
        return sum(renaming.changed for _, renaming in self.renamings)

    @property
    def renamed(self) -> Mapping[str, str]:
        """Keys that get another name, and that name."""
        return {old: new for _, way in self.renamings for old, new in way.changes.items()}


def plan(
    document: Document,
    wanted: Target | None = None,
    *,
    select: str | None = None,
    average: bool = False,
    keep_training_state: bool = False,
    keep_dangerous: bool = False,
    apply_masks: bool = False,
    drop: Sequence[str] = (),
    tensors_only: bool = False,
    untie: bool = False,
) -> Plan:
    """What repairs a document, for a target if there is one.

    With `average` the averages of the weights are taken instead of the weights, and without a
    target nothing but them. With `keep_training_state` the weights are repaired where they are, and
    everything else stays; an optimizer follows its parameters, or is left out. What would run
    commands or code where it is unpickled is left out, unless `keep_dangerous`. Keys that a pattern
    of `drop` matches are dropped; pruned weights are multiplied by their masks with `apply_masks`.
    With `tensors_only`, for containers that hold nothing else and a tied tensor once, keys that the
    target does not tie get tensors of their own; with `untie`, all of them do. Bytes are not read:
    whoever writes the document holds them against the checksums on record.

    Raises:
        SelectionError: there is no state dict, or several fit; a pattern of `drop` matches no key,
            or nothing is pruned.
        RenameError: the keys fit in two ways, or two would become one without their wrappers.
        UnsafeError: there is nothing but what is left out as dangerous.
        KeyMismatchError: a key is missing or a shape differs; carries the report.
        ChangedMeaningError: keys would be dropped that change what others mean.
        UnsupportedError: with `tensors_only`, the target wants a value that is not a tensor.
    """
    given = document
    removed = Removed(document, []) if keep_dangerous else without_dangers(document, select)
    applied = masks.apply_masks(removed.document, select) if apply_masks else None
    document = removed.document if applied is None else applied.document
    before = [*_dangers(removed), *_masks(applied)]
    if average:
        made = _of_averages(document, wanted, select, keep_training_state, tensors_only, drop)
        return _repacked(given, _after(before, removed, made))
    if wanted is None:
        made = _certain(document, select, drop, tensors_only)
        return _finished(_repacked(given, _after(before, removed, made)), None)
    found = match(document, wanted, select, drop=drop)
    mapping = found.mapping()
    untied = _untie(document, mapping, wanted, everything=untie) if tensors_only else []
    made = _fitting(document, wanted, found, mapping, untied)
    if tensors_only:
        made = _written_once(made, mapping)
    if keep_training_state:
        if document.slices:
            raise _not_all_joined(document)
        kept = {old: new for old, new in found.renaming.keys.items() if new in mapping}
        order = {new: old for old, new in kept.items()}
        names = {order[new]: new for new in wanted.specs if new in order}
        made = _followed(made, found.state, names)
    else:
        made = _alone(made, document, found.state, mapping)
    return _finished(_repacked(given, _after(before, removed, made)), wanted)


def _dangers(removed: Removed) -> list[Cure]:
    return [
        Cure("dangerous-globals", path, f"names {name}", "left out")
        for path, name in removed.left_out
    ]


def _masks(applied: Applied | None) -> list[Cure]:
    found = {} if applied is None else applied.keys
    return [
        Cure("pruned-weights", path, f"{plural(len(keys), 'weight')} with a mask", "multiplied")
        for path, keys in found.items()
    ]


def _after(before: list[Cure], removed: Removed, made: Plan) -> Plan:
    """The plan, with what was done to the document before it was made."""
    left_out = [*removed.left_out, *made.left_out]
    return replace(made, cures=[*before, *made.cures], left_out=left_out)


def _followed(made: Plan, state: StateDict, names: Mapping[str, str]) -> Plan:
    """The plan, whose optimizers go with the parameters that stay, or are left out."""
    found = optimizers.follow(made.document, state, names)
    cures = [Cure("optimizer-state", path, what, "kept") for path, what in found.changed]
    what = (
        "it cannot be told which of it belongs to which parameter: nothing names them, and they "
        "are not told apart by their shapes"
    )
    cures += [Cure("optimizer-state", path, what, "left out") for path in found.left_out]
    left_out = [*made.left_out, *((path, "the state of an optimizer") for path in found.left_out)]
    return replace(made, document=found.document, cures=[*made.cures, *cures], left_out=left_out)


def _of_averages(
    document: Document,
    wanted: Target | None,
    select: str | None,
    keep_training_state: bool,
    tensors_only: bool,
    drop: Sequence[str],
) -> Plan:
    """The plan for the averages of a document."""
    document, path, place = averages.take(document, select)
    left_out: list[tuple[str, str]] = []
    if wanted is None:
        document, left_out = reduce.only(document, choose(document, path))
    made = plan(
        document,
        wanted,
        select=None if wanted is None else path,
        keep_training_state=keep_training_state,
        keep_dangerous=True,  # or it is left out already
        drop=drop,
        tensors_only=tensors_only,
    )
    row = Cure("averaged-copy", path, f"averages of the weights at {place}", "taken")
    return replace(made, cures=[row, *made.cures], left_out=[*left_out, *made.left_out])


def _finished(made: Plan, wanted: Target | None) -> Plan:
    """With every storage on the CPU, and what is still wrong named."""
    made = _on_cpu(made)
    found = diagnose(replace(made.document, notes=()))  # those are about the container that was
    still = [row for row in found if row.severity is Severity.ERROR or row.code == _WRAPPER]
    rows = [Remaining(row.code, row.where, row.message, _reason(row, wanted)) for row in still]
    return replace(made, remaining=[*made.remaining, *rows])


def _reason(finding: Finding, wanted: Target | None) -> str:
    """Why an error is left as it is."""
    if finding.code == _WRAPPER:
        if wanted is None:
            return "these are not keys that could be renamed where they are: convert takes them out"
        return f"only what {wanted.name} wants is repaired"
    return _REASONS.get(finding.code, f"fix does not repair it: {CODES[finding.code].cure}")


_REASONS = {
    "no-state-dict": "fix renames keys and tags storages; it cannot tell what the tensors are",
    "key-collision": "one of the two has to get another name, or to go: rename does it",
    "unknown-state": "the model is carried along whole; save its state_dict() where its code is",
    "dangerous-globals": "it was asked to be carried along",
    "flat-parameters": "a model has their shapes: add --model or --like",
}


def _certain(
    document: Document, select: str | None, drop: Sequence[str], tensors_only: bool
) -> Plan:
    """Without the keys that are to be dropped, and the wrappers that every key then carries.

    A model that was pickled in a wrapper is taken out of it. With `tensors_only`, what is written
    is the one state dict that is meant.
    """
    if drop:
        return _without(document, select, drop, tensors_only)
    states = of_models(find(document.root))
    if select is not None or tensors_only:
        states = [choose(document, select)]
    if tensors_only:
        return _alone_and_certain(document, states[0])
    cures = list(_unwrapping(states))
    document = _unwrapped(document, states)
    if cures:
        states = [choose(document, select)] if select is not None else find(document.root)
    states = [state for state in of_models(states) if state.origin is None]
    for state in states:
        foreign.check(document, state.path, state.mapping)
    _check_collisions(document, states)
    found = [(state, wrappers.strip(state.mapping)) for state in states]
    changes = [(state, renaming) for state, renaming in found if renaming.changed]
    cures += [_renaming_cure(state, renaming) for state, renaming in changes]
    renamed = [(state.path, renaming) for state, renaming in changes]
    kept = [row for state, renaming in changes for row in _kept(state, renaming)]
    return Plan(edits.rename(document, changes), cures, renamed, remaining=kept)


def _alone_and_certain(document: Document, state: StateDict) -> Plan:
    """One state dict, or that of a pickled model, without what is beside it."""
    _check_collisions(document, [state])
    renaming = wrappers.strip(state.mapping)
    left_out = reduce.only(document, state).left_out
    mapping = edits.renamed_mapping(state.mapping, renaming)
    root = mapping if renaming.changed or state.mapping is not document.root else document.root
    cures = [_renaming_cure(state, renaming)] if renaming.changed else []
    kept = list(_kept(state, renaming)) if renaming.changed else []
    if root is not document.root:
        document = replace(document, root=root, extras={})
    there = {old: new for old, new in renaming.keys.items() if old in state.tensors}
    renaming = Renaming(there, renaming.rule)  # without the keys of what is left out
    renamed = [(state.path, renaming)] if renaming.changed else []
    return Plan(document, cures, renamed, left_out=left_out, remaining=kept)


def _unwrapping(states: Iterable[StateDict]) -> Iterable[Cure]:
    for state in states:
        if isinstance(state.origin, Inert) and unwrapped(state.origin) is not state.origin:
            what = f"a model pickled in {state.origin.cls}"
            yield Cure(_WRAPPER, state.path, what, "taken out of it")


def _unwrapped(document: Document, states: Iterable[StateDict]) -> Document:
    inner = {
        id(state.origin): unwrapped(state.origin)
        for state in states
        if isinstance(state.origin, Inert)
    }
    if not any(id(node) != key for key, node in inner.items()):
        return document
    return replace(document, root=rebuild(document.root, lambda node: inner.get(id(node), node)))


def _kept(state: StateDict, renaming: Renaming) -> Iterable[Remaining]:
    """The prefix that all keys still share, of which only a model can say whether it is one."""
    start = joined(shared_prefix(renaming.keys.values()))
    if start.partition(".")[0] in _HOLDERS and len(renaming.keys) > 1:
        what = f"all {len(renaming.keys)} keys begin with {start!r}"
        why = "only a model can say whether that is a wrapper's name or its own: add --model"
        yield Remaining("shared-prefix", state.path, what, why)


_HOLDERS = frozenset(
    {"model", "_model", "net", "network", "module", "backbone", "base_model", "inner", "learner",
     "student", "teacher", "policy", "wrapped", "wrapped_model"}
)  # fmt: skip
"""What trainers and wrappers of people's own call the model that they hold."""


def _without(
    document: Document, select: str | None, drop: Sequence[str], tensors_only: bool
) -> Plan:
    """Without keys, and then what is certain."""
    states = choose_all(document, [] if select is None else [select])
    gone = globs.dropped((key for state in states for key in state.mapping), drop, document.name)
    states = [state for state in states if not gone.isdisjoint(state.mapping)]
    smaller = Plan(edits.without(document, states, gone))
    for state in states:
        dropped = [key for key in state.mapping if key in gone]
        found = Cure("dropped-keys", state.path, plural(len(dropped), "key"), "dropped")
        smaller.cures.append(found)
        smaller.dropped.extend(dropped)
        names = {key: key for key in state.mapping if key not in gone}
        smaller = _followed(smaller, state, names)
    made = _certain(smaller.document, select, (), tensors_only)
    return replace(
        made,
        cures=[*smaller.cures, *made.cures],
        dropped=smaller.dropped,
        left_out=[*smaller.left_out, *made.left_out],
    )


def _check_collisions(document: Document, states: Iterable[StateDict]) -> None:
    """Refuse keys with a wrapper's name and without: the model has both, or one is the older."""
    for state in states:
        try:
            wrappers.strip(state.mapping, partial=True)
        except KeyCollisionError as error:
            fix = fixing_for_a_model(document)
            raise error.within(document.name).suggest(
                Hint("say which model it is for", fix)
            ) from None


def _renaming_cure(state: StateDict, renaming: Renaming) -> Cure:
    what = f"carry {renaming.removed}" if renaming.removed else f"lack {renaming.added}"
    found = f"{renaming.changed} of {len(renaming.keys)} keys {what}"
    return Cure(_WRAPPER, state.path, found, renaming.label)


def _on_cpu(made: Plan) -> Plan:
    document, tags = edits.to_cpu(made.document)
    if not tags:
        return made
    found = ", ".join(f"{count} storages on {tag}" for tag, count in tags.items())
    cures = [*made.cures, Cure("device-tag", "/", found, "tagged cpu")]
    return replace(made, document=document, cures=cures)


_REPACKED = {
    "container-refused": "packed as torch does",
    "old-container": "packed as torch does today",
    "hidden-call": "left out",
    "left-on-stack": "left out",
    "metadata-format": "written as pt",
}
"""Findings that are gone once a checkpoint is written anew, and what becomes of each."""


def _repacked(document: Document, made: Plan) -> Plan:
    """The plan, with what writing the document anew repairs."""
    found = [note for note in document.notes if note.code in _REPACKED]
    cures = [Cure(note.code, note.where, note.message, _REPACKED[note.code]) for note in found]
    left = [(row.where, row.found) for row in cures if row.cure == "left out"]
    return replace(made, cures=[*cures, *made.cures], left_out=[*made.left_out, *left])


# --- with a target


def _fitting(
    document: Document, wanted: Target, found: Match, mapping: OrderedMap, untied: list[str]
) -> Plan:
    path, dropped = found.state.path, found.dropped
    taken = {*wanted.specs, *found.report.matched}
    kept = {old: new for old, new in found.renaming.keys.items() if new in taken}
    renaming = Renaming(kept, found.renaming.rule)
    own = [Cure("tied-tensors", path, f"{key} is tied", "untied") for key in untied]
    return Plan(
        _replaced(document, found.state, mapping),
        [*_cures(document, found, wanted), *own],
        [(path, renaming)] if renaming.changed else [],
        dropped,
        of_another_dtype=[row.key for row in found.report.dtype_difference],
        changes=found.report.changes,
        unseen=transposes.unseen(found.report, wanted.specs),
    )


def _cures(document: Document, found: Match, wanted: Target) -> Iterable[Cure]:
    path, dropped = found.state.path, found.dropped
    for row in found.state.made:
        yield Cure(row.code, path, row.found, row.cure)
    if found.renaming.changed:
        yield _renaming_cure(found.state, found.renaming)
    disguised = [one for one in found.state.mapping.values() if without_disguise(one) is not one]
    if disguised:
        what = f"{len(disguised)} keys hold a {disguise(disguised[0]) or 'tensor of a device'}"
        yield Cure("numpy-arrays", path, what, "made tensors")
    others, fit = found.report.passed_over, " that fit as well"
    if not others and not found.is_average:
        others, fit = averages.places(document), ""
    if others:
        what = f"averages{fit}: {', '.join(others)}"
        yield Cure("averaged-copy", path, what, "not taken; --average takes them")
    for key, other in found.tied.items():
        yield Cure("tied-tensors", path, f"{key} is missing", f"tied to {other}")
    told = sum(key not in found.renaming.keys for key in dropped)
    if told:
        yield Cure("dropped-keys", path, f"{plural(told, 'key')} that --drop names", "dropped")
    if len(dropped) > told:
        what = f"{plural(len(dropped) - told, 'key')} that {wanted.name} does not have"
        yield Cure("unexpected-keys", path, what, "dropped")


def _untie(
    document: Document, mapping: OrderedMap, wanted: Target, *, everything: bool
) -> list[str]:
    """Give a storage of its own to each tied key that the target does not tie; returns the keys.

    With `everything`, to those that it ties as well.

    Raises `UnsupportedError` for a value that is not a tensor.
    """
    group = {key: keys for keys in wanted.ties for key in keys}
    first: dict[Hashable, str] = {}
    untied = []
    for key, node in mapping.items():
        tensor = as_tensor(node)
        if tensor is None and not is_special_tensor(node):
            raise reduce.cannot_hold(document, key, kind(node))
        if tensor is None or not tensor.numel:
            continue
        other = first.setdefault(tensor.view, key)
        if other != key and (everything or other not in group.get(key, ())):
            mapping[key] = replace(tensor, storage=replace(tensor.storage))
            untied.append(key)
    return untied


def _written_once(made: Plan, mapping: OrderedMap) -> Plan:
    """The plan, with the keys that a container of tensors has as other names alone."""
    first: dict[Hashable, str] = {}
    once: dict[str, str] = {}
    nbytes = 0
    for key, node in mapping.items():
        tensor = as_tensor(node)
        if tensor is not None and tensor.numel:
            other = first.setdefault(tensor.view, key)
            if other != key:
                once[key] = other
                nbytes += tensor.nbytes
    return replace(made, written_once=once, untying=nbytes)


def _replaced(document: Document, state: StateDict, mapping: OrderedMap) -> Document:
    def change(node: Node) -> Node:
        return mapping if node is state.node else node

    return replace(document, root=rebuild(document.root, change))


def _not_all_joined(document: Document) -> UnsupportedError:
    return UnsupportedError(
        "is one of several slices: shapes say how the weights are joined, and nothing else",
        where=document.name,
        hint="leave out --keep-training-state",
        code="tensor-parallel",
    )


def _alone(made: Plan, document: Document, state: StateDict, mapping: OrderedMap) -> Plan:
    """The plan reduced to the state dict, with what lies beside it named."""
    left_out = reduce.only(document, state).left_out
    cures = list(made.cures)
    if state.mapping is not document.root and not (state.made and state.node is document.root):
        beside = f", beside {len(left_out)} other things" if left_out else ""
        found = f"the state dict lies in a checkpoint{beside}"
        cures.append(Cure("nested", state.path, found, "taken out"))
    alone = replace(document, root=mapping, extras={}, slices=())
    return replace(made, document=alone, cures=cures, left_out=left_out)

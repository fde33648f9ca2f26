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

from ckptfix.contents.state_dicts import StateDict, choose, find, is_special_tensor, of_models
from ckptfix.contents.tensors import as_tensor
from ckptfix.door import beside
from ckptfix.edit import edits, reduce
from ckptfix.errors import KeyCollisionError
from ckptfix.hints import Hint, command
from ckptfix.keys import wrappers
from ckptfix.match.choose import match
from ckptfix.tree.document import kind
from ckptfix.tree.rebuild import rebuild

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.choose import Match
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document, Node, OrderedMap


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
    of_another_dtype: list[str] = field(default_factory=list)
    """Keys whose dtype is not the target's: they are left, and torch casts them."""


def plan(
    document: Document,
    wanted: Target | None = None,
    *,
    select: str | None = None,
    keep_training_state: bool = False,
    tensors_only: bool = False,
) -> Plan:
    """What repairs a document, for a target if there is one.

    With `keep_training_state` the weights are repaired where they are, and everything else stays.
    With `tensors_only`, for containers that hold nothing else and a tied tensor once, keys that the
    target does not tie get tensors of their own. Bytes are not read: whoever writes the document
    holds them against the checksums on record.

    Raises:
        SelectionError: there is no state dict, or several fit.
        RenameError: the keys fit in two ways, or two would become one without their wrappers.
        KeyMismatchError: a key is missing or a shape differs; carries the report.
        UnsupportedError: with `tensors_only`, the target wants a value that is not a tensor.
    """
    if wanted is None:
        return _repacked(document, _on_cpu(_certain(document, select)))
    found = match(document, wanted, select)
    mapping = found.mapping()
    untied = _untie(document, mapping, wanted) if tensors_only else []
    made = _fitting(document, wanted, found, mapping, untied)
    if not keep_training_state:
        made = _alone(made, document, found.state, mapping)
    return _repacked(document, _on_cpu(made))


def _certain(document: Document, select: str | None) -> Plan:
    """Without the wrappers that every key of a state dict carries."""
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    states = [state for state in states if state.origin is None]
    _check_collisions(document, states)
    found = [(state, wrappers.strip(state.mapping)) for state in states]
    changes = [(state, renaming) for state, renaming in found if renaming.changed]
    cures = [_renaming_cure(state, renaming) for state, renaming in changes]
    renamed = _changed(renaming for _, renaming in changes)
    return Plan(edits.rename(document, changes), cures, renamed)


def _check_collisions(document: Document, states: Iterable[StateDict]) -> None:
    """Refuse keys with a wrapper's name and without: the model has both, or one is the older."""
    for state in states:
        try:
            wrappers.strip(state.mapping, partial=True)
        except KeyCollisionError as error:
            fix = command("fix", document.name, beside(document, "fixed"), model="FILE.py:NAME")
            raise error.within(document.name).suggest(
                Hint("say which model it is for", fix)
            ) from None


def _renaming_cure(state: StateDict, renaming: Renaming) -> Cure:
    what = f"carry {renaming.removed}" if renaming.removed else f"lack {renaming.added}"
    found = f"{renaming.changed} of {len(renaming.keys)} keys {what}"
    return Cure("prefix-wrapper", state.path, found, renaming.label)


def _changed(renamings: Iterable[Renaming]) -> dict[str, str]:
    return {old: new for way in renamings for old, new in way.changes.items()}


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
    path, dropped = found.state.path, found.unused
    renamed = _changed([found.renaming])
    own = [Cure("tied-tensors", path, f"{key} is tied", "untied") for key in untied]
    return Plan(
        _replaced(document, found.state, mapping),
        [*_cures(found, wanted), *own],
        {old: new for old, new in renamed.items() if new in wanted.specs},
        dropped,
        of_another_dtype=[row.key for row in found.report.dtype_difference],
    )


def _cures(found: Match, wanted: Target) -> Iterable[Cure]:
    path, dropped = found.state.path, found.unused
    if found.renaming.changed:
        yield _renaming_cure(found.state, found.renaming)
    if found.report.passed_over:
        what = f"averages that fit as well: {', '.join(found.report.passed_over)}"
        yield Cure("averaged-copy", path, what, "not taken")
    for key, other in found.tied.items():
        yield Cure("tied-tensors", path, f"{key} is missing", f"tied to {other}")
    if dropped:
        what = f"{len(dropped)} keys that {wanted.name} does not have"
        yield Cure("unexpected-keys", path, what, "dropped")


def _untie(document: Document, mapping: OrderedMap, wanted: Target) -> list[str]:
    """Give a storage of its own to each tied key that the target does not tie; returns the keys.

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
        if other != key and other not in group.get(key, ()):
            mapping[key] = replace(tensor, storage=replace(tensor.storage))
            untied.append(key)
    return untied


def _replaced(document: Document, state: StateDict, mapping: OrderedMap) -> Document:
    def change(node: Node) -> Node:
        return mapping if node is state.node else node

    return replace(document, root=rebuild(document.root, change))


def _alone(made: Plan, document: Document, state: StateDict, mapping: OrderedMap) -> Plan:
    """The plan reduced to the state dict, with what lies beside it named."""
    left_out = reduce.only(document, state).left_out
    cures = list(made.cures)
    if state.mapping is not document.root:
        beside = f", beside {len(left_out)} other things" if left_out else ""
        found = f"the state dict lies in a checkpoint{beside}"
        cures.append(Cure("nested", state.path, found, "taken out"))
    alone = replace(document, root=mapping, extras={})
    return replace(made, document=alone, cures=cures, left_out=left_out)

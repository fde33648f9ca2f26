"""Which state dict of a checkpoint is meant for a target, and under which names.

One answer for everything that repairs or loads: all state dicts and all renamings are tried, and
the only one that gives the target all it wants is taken. Nothing is guessed: where two do, both
are refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents.state_dicts import (
    StateDict,
    are_averages,
    choose,
    distinct,
    find,
    known,
    of_models,
)
from ckptfix.contents.tensors import as_tensor, without_disguise
from ckptfix.diffs.values import Side, same_values
from ckptfix.door import beside
from ckptfix.errors import KeyCollisionError, KeyMismatchError, RenameError, SelectionError
from ckptfix.hints import Command, Hint, adding, command
from ckptfix.keys import prefixes
from ckptfix.keys.renaming import (
    components_of,
    joined,
    prefix_of,
    renamed_by,
    shared_prefix,
    shared_start,
)
from ckptfix.keys.wrappers import bare_prefix
from ckptfix.match import judge, mismatches
from ckptfix.tree.document import Document, OrderedMap, kind

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target
    from ckptfix.report import Report


class Match(NamedTuple):
    """A state dict, a renaming of it, and how it compares with the target then."""

    state: StateDict
    renaming: Renaming
    report: Report
    """With the ties made: a key that is tied to one that is there is not missing."""
    tied: Mapping[str, str]
    """Keys that the file lacks, and keys of the target that name the same tensor and are there."""
    part: str
    """What the old keys of the part that is meant begin with; empty where all of it is meant."""

    @property
    def fits(self) -> bool:
        """Whether the target gets all it wants."""
        return not self.report.missing and not self.report.shape_mismatch

    @property
    def is_average(self) -> bool:
        """Whether it takes averages of weights, which stand in a state dict or a part of one."""
        within = components_of(self.part)
        return are_averages((*(["ema"] if self.state.is_average else []), *within))

    @property
    def place(self) -> str:
        """Where its tensors stand, for people: `state_dict_ema`, `module.encoder_k.*`."""
        return self.state.path if self.state.is_average or not self.part else f"{self.part}*"

    @property
    def unused(self) -> list[str]:
        """Keys that the target does not have, by their old names."""
        unexpected = set(self.report.unexpected)
        return [old for old, new in self.renaming.keys.items() if new in unexpected]

    def mapping(self) -> OrderedMap:
        """The state dict as the target has it, with its ties and nothing that it does not have."""
        left, new = set(self.unused), self.renaming.keys
        items = OrderedMap(
            (new[key], without_disguise(node))
            for key, node in self.state.mapping.items()
            if key not in left
        )
        items.update({key: items[other] for key, other in self.tied.items()})
        versions = self.state.metadata
        if versions is not None:
            items.attributes = {"_metadata": OrderedMap(self.renaming.metadata(versions))}
        return items


def match(
    document: Document, wanted: Target, select: str | None = None, *, partly: bool = False
) -> Match:
    """The only state dict, and the only renaming of it, that gives the target all it wants.

    Keys as they are come before all other ways; averages stand back where something else fits,
    and are listed in the report; one prefix is put in the place of another only where nothing else
    fits. With `partly`, where nothing fits, the one that comes nearest.

    Raises:
        SelectionError: there is no state dict, or several fit.
        RenameError: the keys fit in two ways, or a key is there twice.
        KeyMismatchError: a key is missing or a shape differs, and not `partly`; or two tensors
            differ that are one in the target. Has the report.
    """
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    states = distinct(states) or [choose(document)]  # which says that there is none
    if all(state.role == "loose" for state in states):
        raise _no_names(document, wanted)
    whole = _whole(states, wanted)
    found = _plain(whole) or _nearest(states, wanted)
    if len(found) > 1 and (whole or partly):
        raise _several(document, found, wanted)
    _check_twice(document, found[0], wanted)
    if not whole:
        known(document, found[0].state)
    if not whole and not partly:
        raise mismatches.error(document, found[0].state, found[0].report, wanted.name)
    _check_ties(document, found[0], wanted)
    passed_over = [one.place for one in whole if one is not found[0]]
    return found[0]._replace(report=replace(found[0].report, passed_over=passed_over))


def _no_names(document: Document, wanted: Target) -> SelectionError:
    return SelectionError(
        f"holds no state dict for {wanted.name}: its tensors have no names ({kind(document.root)})",
        where=document.name,
        hint=Hint("see what it holds", command("inspect", document.name)),
        code="no-state-dict",
    )


def _check_twice(document: Document, found: Match, wanted: Target) -> None:
    """Refuse keys that are there with a wrapper's prefix and without: one of them is the older."""
    old_of = {new: old for old, new in found.renaming.keys.items()}
    for old, bare in renamed_by(found.unused, bare_prefix).items():
        if bare in wanted.specs and bare in old_of:
            aside = _putting_aside(document, found, old)
            error = KeyCollisionError(old, old_of[bare], bare).within(document.name)
            raise error.suggest(Hint(f"to take {old_of[bare]!r}", aside))


def _check_ties(document: Document, meant: Match, wanted: Target) -> None:
    """Refuse different tensors for one tensor of the target: the one loaded last would stay."""
    mapping = meant.mapping() if wanted.ties else {}
    tensors = {key: as_tensor(node) for key, node in mapping.items()}
    for keys in wanted.ties:
        sides = {
            key: Side(found, document.byteorder) for key in keys if (found := tensors.get(key))
        }
        for first, second in pairwise(sides):
            if not same_values(sides[first], sides[second]):
                raise KeyMismatchError(
                    meant.report,
                    f"{first!r} and {second!r} are one tensor of {wanted.name}, "
                    "and two different ones in the file",
                    where=document.name,
                    hint=Hint(
                        "build the model as it was trained, without that tie (--init)",
                        python="build the model as it was trained, without that tie",
                    ),
                )


def _plain(found: list[Match]) -> list[Match]:
    """Without averages, unless there is nothing else."""
    return [one for one in found if not one.is_average] or found


def _whole(states: list[StateDict], wanted: Target) -> list[Match]:
    """All that give the target all it wants, without exchanging prefixes if that can be."""
    for exchange in (False, True):
        found = [one for state in states for one in _fitting(state, wanted, exchange)]
        if found:
            return _distinct(found)
    return []


def _distinct(found: list[Match]) -> list[Match]:
    """Without those that give the target the very tensors that an earlier one gives it."""
    if len(found) < 2:
        return found
    by_tensors: dict[Hashable, Match] = {}
    for one in found:
        new, wanted = one.renaming.keys, set(one.report.matched)
        pairs = ((new[key], tensor.view) for key, tensor in one.state.tensors.items())
        given = frozenset(pair for pair in pairs if pair[0] in wanted)
        by_tensors.setdefault(given, one)
    return list(by_tensors.values())


def _fitting(state: StateDict, wanted: Target, exchange: bool) -> list[Match]:
    """All ways in which one state dict fits; where its keys do as they are, only that."""
    ways = prefixes.ways(state.mapping, wanted.specs_for(state), exchange=exchange)
    found = [one for way in ways if (one := _held_against(state, wanted, way)).fits]
    return found[:1] if found and found[0].renaming is ways[0] else found


def _nearest(states: list[StateDict], wanted: Target) -> list[Match]:
    """The ways that give the target most of what it wants."""
    found = _plain(
        [
            _held_against(state, wanted, way)
            for state in states
            for way in prefixes.nearest(state.mapping, wanted.specs_for(state))
        ]
    )
    best = max(one.report.share for one in found)
    return _distinct([one for one in found if one.report.share == best])


def _held_against(state: StateDict, wanted: Target, renaming: Renaming) -> Match:
    there = set(renaming.keys.values())
    others = {key: _present(key, wanted.ties, there) for key in wanted.specs if key not in there}
    tied = {key: other for key, other in others.items() if other is not None}
    report = judge.report(state, wanted, renaming, tied)
    return Match(state, renaming, report, tied, _part(renaming, wanted))


def _present(key: str, ties: Iterable[Iterable[str]], there: set[str]) -> str | None:
    """A key that names the same tensor of the target as `key`, and is there."""
    groups = (group for group in ties if key in group)
    return next((other for group in groups for other in group if other in there), None)


def _part(renaming: Renaming, wanted: Target) -> str:
    """The prefix that all keys which the target wants have lost, such as `module.encoder_q.`."""
    pairs = [(old, new) for old, new in renaming.keys.items() if new in wanted.specs]
    if not pairs:
        return ""
    old, new = (shared_prefix(keys) for keys in zip(*pairs, strict=True))
    tail = len(shared_start(old[::-1], new[::-1]))
    return joined(old[: len(old) - tail])


def _several(
    document: Document, found: list[Match], wanted: Target
) -> SelectionError | RenameError:
    verb = "fit" if found[0].fits else "come equally near"
    paths = list(dict.fromkeys(one.state.path for one in found))
    if len(paths) > 1:
        return SelectionError(
            f"{len(paths)} state dicts {verb} {wanted.name}: {', '.join(paths)}",
            where=document.name,
            hint=adding("choose one", "select", paths[0]),
            code="ambiguous-state-dict",
        )
    labels = "; ".join(one.renaming.label for one in found)
    return RenameError(
        f"the keys {verb} {wanted.name} in {len(found)} ways: {labels}",
        where=document.name,
        hint=Hint("choose one", _stripping(document, found)),
        code="ambiguous-prefix",
    )


def _putting_aside(document: Document, found: Match, key: str) -> Command:
    """The command that gives keys which begin as one does another name, which nobody wants."""
    start = prefix_of(key).removesuffix(bare_prefix(prefix_of(key))) or prefix_of(key)
    return command(
        "rename",
        document.name,
        beside(document, "renamed"),
        sub=(f"^{re.escape(start)}", "unused."),
        select=found.state.selection,
    )


def _stripping(document: Document, found: list[Match]) -> Command:
    """The command that decides for the first of several ways, where stripping a prefix does."""
    return command(
        "strip-prefix",
        document.name,
        beside(document, "part"),
        partial=True,
        prefix=next((one.part for one in found if one.part), "PREFIX"),
        select=found[0].state.selection,
    )

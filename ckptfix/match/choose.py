"""Which state dict of a checkpoint is meant for a target, and under which names.

One answer for everything that repairs or loads: all state dicts and all renamings are tried, and
the only one that gives the target all it wants is taken. Nothing is guessed: where two do, both
are refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.contents import foreign
from ckptfix.contents.state_dicts import (
    StateDict,
    are_averages,
    choose,
    distinct,
    find,
    known,
    of_models,
)
from ckptfix.door import beside
from ckptfix.edit import edits
from ckptfix.errors import (
    ChangedMeaningError,
    CkptfixError,
    KeyCollisionError,
    KeyMismatchError,
    RenameError,
    SelectionError,
)
from ckptfix.hints import Command, Hint, adding, command
from ckptfix.keys import globs, prefixes, wrappers
from ckptfix.keys.renaming import (
    components_of,
    joined,
    prefix_of,
    renamed_by,
    shared_prefix,
    shared_start,
)
from ckptfix.match import joins, judge, meanings, mismatches, rules
from ckptfix.tree.document import Document, OrderedMap, kind

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

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
        return self.report.fits

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
    def used(self) -> list[str]:
        """Keys that the target takes, by their old names."""
        unused = set(self.unused)
        return [old for old in self.renaming.keys if old not in unused]

    @property
    def unused(self) -> list[str]:
        """Keys that the target does not have, by their old names."""
        unexpected = set(self.report.unexpected)
        return [old for old, new in self.renaming.keys.items() if new in unexpected]

    @property
    def dropped(self) -> list[str]:
        """The same, and keys that were to be dropped, in the order of the state dict."""
        unused = set(self.unused)
        there = self.renaming.keys
        return [key for key in self.state.mapping if key in unused or key not in there]

    def mapping(self) -> OrderedMap:
        """The state dict as the target has it, with its ties and nothing that it does not have."""
        items = judge.renamed(self.state, self.renaming)
        for key in self.unused:
            del items[self.renaming.keys[key]]
        items.update({key: items[other] for key, other in self.tied.items()})
        return items


def match(
    document: Document,
    wanted: Target,
    select: str | None = None,
    *,
    partly: bool = False,
    drop: Sequence[str] = (),
) -> Match:
    """The only state dict, and the only renaming of it, that gives the target all it wants.

    Keys as they are come before all other ways; averages stand back where something else fits,
    and are listed in the report; one prefix is put in the place of another only where nothing else
    fits. With `partly`, where nothing fits, the one that comes nearest. Keys that a pattern of
    `drop` matches are not there.

    Raises:
        SelectionError: there is no state dict, or several fit; or a pattern matches no key.
        UnsupportedError: the values of a state dict lie in another layout than torch's, or a part
            of a pickled model keeps its weights in an unknown way.
        ChangedMeaningError: keys that would be dropped change what others mean.
        RenameError: the keys fit in two ways, or a key is there twice.
        KeyMismatchError: a key is missing or a shape differs, and not `partly`; or two tensors
            differ that are one in the target. Has the report.
    """
    found, error = look(document, wanted, select, partly=partly, drop=drop)
    if error is not None:
        raise error
    return found


def look(
    document: Document,
    wanted: Target,
    select: str | None = None,
    *,
    partly: bool = False,
    drop: Sequence[str] = (),
) -> tuple[Match, CkptfixError | None]:
    """What `match` gives, or the nearest there is with the error that `match` raises.

    Raises `SelectionError` where there is no state dict, or a pattern of `drop` matches no key, and
    `UnsupportedError` as `match` does.
    """
    there = find(document.root) if select is None else []
    asked = of_models(there) if select is None else [choose(document, select)]
    original = _states(document, wanted, asked)
    states = _without(document, original, drop)
    whole = _whole(document, states, wanted)
    found = _plain(whole) or _nearest(document, states, wanted)
    best = found[0]
    meant = next(one for one, new in zip(original, states, strict=True) if new is best.state)
    passed_over = [one.place for one in whole if one is not best]
    report = replace(best.report, passed_over=passed_over)
    return best._replace(report=report, state=meant), _error(
        document, found, wanted, whole, partly, there
    )


def as_it_stands(
    document: Document, wanted: Target, select: str | None = None
) -> tuple[Match, Report, CkptfixError | None]:
    """What `look` gives, and between the two how the state dict compares as it is saved.

    One that torch takes, and that something beside it makes another model of, is refused.
    """
    found, error = look(document, wanted, select)
    if isinstance(error, SelectionError):
        raise error
    report = judge.as_it_stands(document, found.state, wanted)
    if report.loads and isinstance(error, ChangedMeaningError):
        report = replace(report, refusals=[error.what])
    return found, report, error


def _states(document: Document, wanted: Target, states: list[StateDict]) -> list[StateDict]:
    """Every state dict that could be meant, of some."""
    states = distinct(states) or [choose(document)]  # which says that there is none
    if all(state.role == "loose" for state in states):
        raise _no_names(document, wanted)
    for state in states:
        foreign.check(document, state.path, state.mapping)
    return joins.made_for(document, states, wanted)


def _without(document: Document, states: list[StateDict], drop: Sequence[str]) -> list[StateDict]:
    if not drop:
        return states
    keys = (key for state in states for key in state.mapping)
    gone = globs.dropped(keys, drop, document.name)
    return [replace(state, mapping=edits.mapping_without(state.mapping, gone)) for state in states]


def _error(
    document: Document,
    found: list[Match],
    wanted: Target,
    whole: list[Match],
    partly: bool,
    there: list[StateDict],
) -> CkptfixError | None:
    """Why the first of several is not taken; None: it is."""
    best = found[0]
    if len(found) > 1 and (whole or partly):
        return _several(document, found, wanted)
    twice = _twice(document, best, wanted)
    if twice is not None:
        return twice
    unmade = joins.refusal(document, best.state, fits=best.fits)
    if unmade is not None:
        return unmade
    if not whole:
        known(document, best.state)
    if not whole and (not partly or best.report.refusals or not best.report.matched):
        return _refusal(document, best, wanted)
    about = best.renaming.keys, best.report, wanted.name
    error = meanings.changed(document, best.state, *about)
    if error is not None:
        return error
    others = [
        state for state in there if state.path != best.state.path and state.role not in _APART
    ]
    return meanings.changed_beside(document, best.state, others, *about)


_APART = ("ema", "swa", "optimizer")
"""Roles of what stands for itself beside a model."""


def _refusal(document: Document, found: Match, wanted: Target) -> KeyMismatchError:
    """Why nothing fits: what comes nearest, what it lacks, and what is to be done."""
    about = found.state, found.renaming.keys, found.report
    error = meanings.instead(document, *about, wanted.name)
    if error is not None:
        return error
    hint = rules.hint(document, found.state, found.renaming, found.report, wanted)
    return mismatches.error(document, found.state, found.report, wanted, hint)


def _no_names(document: Document, wanted: Target) -> SelectionError:
    return SelectionError(
        f"holds no state dict for {wanted.name}: its tensors have no names ({kind(document.root)})",
        where=document.name,
        hint=Hint("see what it holds", command("inspect", document.name)),
        code="no-state-dict",
    )


def _twice(document: Document, found: Match, wanted: Target) -> CkptfixError | None:
    """The refusal of keys with a wrapper's prefix and without: one of them is the older."""
    old_of = {new: old for old, new in found.renaming.keys.items()}
    for old, bare in renamed_by(found.unused, wrappers.bare_prefix).items():
        if bare in wanted.specs and bare in old_of:
            aside = _putting_aside(document, found, old)
            error = KeyCollisionError(old, old_of[bare], bare).within(document.name)
            return error.suggest(Hint(f"to take {old_of[bare]!r}", aside))
    return None


def _plain(found: list[Match]) -> list[Match]:
    """Without averages, unless there is nothing else."""
    return [one for one in found if not one.is_average] or found


def _whole(document: Document, states: list[StateDict], wanted: Target) -> list[Match]:
    """All that give the target all it wants, without exchanging prefixes if that can be."""
    for exchange in (False, True):
        found = [one for state in states for one in _fitting(document, state, wanted, exchange)]
        if any(one.report.forgiven for one in found):
            return _best(found)
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


def _fitting(document: Document, state: StateDict, wanted: Target, exchange: bool) -> list[Match]:
    """All ways in which one state dict fits; where its keys do as they are, only that."""
    as_it_is, *others = _ways(state, wanted, exchange)
    first = _held_against(document, state, wanted, as_it_is)
    if first.fits and not first.report.forgiven:
        return [first]
    found = [first, *(_held_against(document, state, wanted, way) for way in others)]
    distinct: dict[object, Match] = {}
    for one in found:
        if one.fits:  # a model may know two names for what it takes: one of them will do
            distinct.setdefault(frozenset(one.used) if wanted.model else id(one), one)
    return list(distinct.values())


def _ways(state: StateDict, wanted: Target, exchange: bool) -> list[Renaming]:
    """Every renaming worth a look. A model may know older names, which are not in its list."""
    ways = prefixes.ways(state.mapping, wanted.specs_for(state), exchange=exchange)
    bare = wrappers.strip(state.mapping) if wanted.model is not None else ways[0]
    return ways if any(bare.keys == way.keys for way in ways) else [*ways, bare]


def _nearest(document: Document, states: list[StateDict], wanted: Target) -> list[Match]:
    """The ways that give the target most of what it wants."""
    found = _plain(
        [
            _held_against(document, state, wanted, way)
            for state in states
            for way in prefixes.nearest(state.mapping, wanted.specs_for(state))
        ]
    )
    return _best(found)


def _best(found: list[Match]) -> list[Match]:
    """Those that give the target most of what it wants."""
    best = max(one.report.share for one in found)
    return _distinct([one for one in found if one.report.share == best])


def _held_against(
    document: Document, state: StateDict, wanted: Target, renaming: Renaming
) -> Match:
    report, tied = judge.once_repaired(document, state, wanted, renaming)
    return Match(state, renaming, report, tied, _part(renaming, wanted))


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
    start = prefix_of(key).removesuffix(wrappers.bare_prefix(prefix_of(key))) or prefix_of(key)
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

"""Which state dict of a checkpoint is meant for a target, and under which names.

One answer for everything that mends or loads: all state dicts and all renamings are tried, and the
only one that gives the target all it wants is taken. Nothing is guessed: two that do are refused.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, NamedTuple

from ckptfix import fitting, mismatches
from ckptfix import target as targets
from ckptfix.diagnose import command
from ckptfix.document import Document, OrderedMap
from ckptfix.errors import KeyCollisionError, RenameError, SelectionError
from ckptfix.renaming import components_of, joined, prefix_of, renamed_by, shared_start
from ckptfix.state_dicts import StateDict, choose, find, of_models
from ckptfix.wrappers import bare_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ckptfix.compare import Report
    from ckptfix.renaming import Renaming
    from ckptfix.target import Target


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
    averages: tuple[str, ...] = ()
    """Paths of averaged copies that fit as well, and that were not taken."""

    @property
    def fits(self) -> bool:
        """Whether the target gets all it wants."""
        return not self.report.missing and not self.report.shape_mismatch

    @property
    def unused(self) -> list[str]:
        """Keys that the target does not have, by their old names."""
        unexpected = set(self.report.unexpected)
        return [old for old, new in self.renaming.keys.items() if new in unexpected]

    @property
    def unexpected(self) -> list[str]:
        """Those of the part that is meant; what lies beside it was never meant for the target.

        Nor was the counter that `AveragedModel` keeps beside the model that it averages.
        """
        own = {"n_averaged"} if self.state.role == "swa" else set()
        return [old for old in self.unused if old.startswith(self.part) and old not in own]

    def mapping(self, *, unexpected: bool = False) -> OrderedMap:
        """The state dict as the target has it, with its ties; with what is `unexpected`, or not."""
        left = set(self.unused) - set(self.unexpected if unexpected else ())
        new = self.renaming.keys
        items = OrderedMap(
            (new[key], node) for key, node in self.state.mapping.items() if key not in left
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

    Averaged copies stand back where another state dict fits. With `partly`, where none does, the
    one that comes nearest.

    Raises:
        SelectionError: there is no state dict, or several fit.
        RenameError: the keys fit in two ways, or a key is there twice.
        KeyMismatchError: a key is missing or a shape differs, and not `partly`; has the report.
    """
    states = [choose(document, select)] if select is not None else of_models(find(document.root))
    states = states or [choose(document)]  # which says that there is none
    found = [one for state in states for one in _matches(state, wanted)]
    whole_and_averaged = [one for one in found if one.fits]
    whole = _plain(whole_and_averaged)
    if not whole:
        whole = _nearest(_plain(found))
        if not partly:
            raise mismatches.error(document.name, whole[0].state.path, whole[0].report, wanted.name)
    if len(whole) > 1:
        raise _several(document, whole, wanted)
    if not partly:
        _check_twice(document.name, whole[0], wanted)
    averages = dict.fromkeys(one.state.path for one in whole_and_averaged if one not in whole)
    return whole[0]._replace(averages=tuple(averages))


def _check_twice(name: str, found: Match, wanted: Target) -> None:
    """Refuse keys that are there with a wrapper's prefix and without: one of them is the older."""
    old_of = {new: old for old, new in found.renaming.keys.items()}
    for old, bare in renamed_by(found.unused, bare_prefix).items():
        if bare in wanted.specs and bare in old_of:
            error = KeyCollisionError(old, old_of[bare], bare)
            error.message = f"{name}: {error.message}"
            raise error


def _plain(found: list[Match]) -> list[Match]:
    """Without averaged copies, unless there is nothing else."""
    return [one for one in found if one.state.role != "ema"] or found


def _nearest(found: list[Match]) -> list[Match]:
    best = max(one.report.share for one in found)
    return [one for one in found if one.report.share == best]


def _matches(state: StateDict, wanted: Target) -> list[Match]:
    specs = wanted.specs_for(state)
    renamings = fitting.fits(state.mapping, specs) or fitting.nearest(state.mapping, specs)
    return [_held_against(state, wanted, renaming) for renaming in renamings]


def _held_against(state: StateDict, wanted: Target, renaming: Renaming) -> Match:
    there = set(renaming.keys.values())
    others = {key: _present(key, wanted.ties, there) for key in wanted.specs if key not in there}
    tied = {key: other for key, other in others.items() if other is not None}
    report = targets.report(state, wanted, renaming, tied)
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
    old, new = (_shared_prefix(keys) for keys in zip(*pairs, strict=True))
    tail = len(shared_start(old[::-1], new[::-1]))
    return joined(old[: len(old) - tail])


def _shared_prefix(keys: Iterable[str]) -> tuple[str, ...]:
    prefixes = {components_of(prefix_of(key)) for key in keys}
    return shared_start(min(prefixes), max(prefixes))


def _several(
    document: Document, found: list[Match], wanted: Target
) -> SelectionError | RenameError:
    verb = "fit" if found[0].fits else "come equally near"
    paths = list(dict.fromkeys(one.state.path for one in found))
    if len(paths) > 1:
        return SelectionError(
            f"{document.name}: {len(paths)} state dicts {verb} {wanted.name}: {', '.join(paths)}",
            hint=f"choose one: add --select {shlex.quote(paths[0])}",
            code="ambiguous-state-dict",
        )
    labels = "; ".join(one.renaming.label for one in found)
    return RenameError(
        f"{document.name}: the keys {verb} {wanted.name} in {len(found)} ways: {labels}",
        hint=f"choose one: {_stripping(document, found)}",
        code="ambiguous-prefix",
    )


def _stripping(document: Document, found: list[Match]) -> str:
    """The command that decides for the first of several ways, where stripping a prefix does."""
    prefix = next((one.part for one in found if one.part), "PREFIX")
    path = found[0].state.path
    select = () if path == "/" else ("--select", path)
    return command("strip-prefix", document, "part", "--partial", "--prefix", prefix, *select)

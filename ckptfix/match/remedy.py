"""The one command that makes a state dict fit a target, where there is one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.errors import RenameError
from ckptfix.hints import command
from ckptfix.keys import prefixes, wrappers
from ckptfix.match import judge

if TYPE_CHECKING:
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document


# --- against a target


class Remedy(NamedTuple):
    """What would make a state dict fit a target: in words, and as a command where there is one."""

    message: str
    command: str | None


def remedy(document: Document, state: StateDict, wanted: Target) -> Remedy | None:
    """What makes the keys of a state dict those of the target; None where no renaming does."""
    ways = prefixes.fits(state.mapping, wanted.specs_for(state))
    if len(ways) > 1:
        listed = "; ".join(way.label for way in ways)
        return Remedy(f"The keys fit in {len(ways)} ways: {listed}.", None)
    if not ways or not judge.report(state, wanted, ways[0]).loads:
        return None
    select = () if state.path == "/" else ("--select", state.path)
    found = _command_for(ways[0], document, state, select)
    if found is None:
        message = (
            f"They match once renamed ({ways[0].label}): ckptfix.load_into(model, path) does it."
        )
        return Remedy(message, None)
    return Remedy(f"They match once renamed ({ways[0].label}):", found)


def _command_for(
    way: Renaming, document: Document, state: StateDict, select: tuple[str, ...]
) -> str | None:
    """The command that renames exactly as `way` does."""
    keys = state.mapping
    with contextlib.suppress(RenameError):
        if wrappers.strip(keys).keys == way.keys:
            return command("strip-prefix", document, "stripped", *select)
        if way.removed and wrappers.strip(keys, prefix=way.removed).keys == way.keys:
            return command("strip-prefix", document, "stripped", "--prefix", way.removed, *select)
    if way.added and wrappers.add(keys, way.added).keys == way.keys:
        return command("add-prefix", document, "prefixed", "--prefix", way.added, *select)
    return None

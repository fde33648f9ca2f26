"""The one command that makes a state dict fit a target, where there is one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from ckptfix.door import beside
from ckptfix.errors import RenameError
from ckptfix.hints import Command, command
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
    command: Command | None


def remedy(document: Document, state: StateDict, wanted: Target) -> Remedy | None:
    """What makes the keys of a state dict those of the target; None where no renaming does."""
    ways = prefixes.fits(state.mapping, wanted.specs_for(state))
    if len(ways) > 1:
        listed = "; ".join(way.label for way in ways)
        return Remedy(f"The keys fit in {len(ways)} ways: {listed}.", None)
    if not ways or not ways[0].changed:
        return None
    if not judge.as_it_stands(document, state, wanted, ways[0]).loads:
        return None
    found = _command_for(ways[0], document, state)
    if found is None:
        message = (
            f"They match once renamed ({ways[0].label}): ckptfix.load_into(model, path) does it."
        )
        return Remedy(message, None)
    return Remedy(f"They match once renamed ({ways[0].label}):", found)


def _command_for(way: Renaming, document: Document, state: StateDict) -> Command | None:
    """The command that renames exactly as `way` does."""

    def made(verb: str, suffix: str, prefix: str | None = None) -> Command:
        out, select = beside(document, suffix), state.selection
        return command(verb, document.name, out, prefix=prefix, select=select)

    keys = state.mapping
    with contextlib.suppress(RenameError):
        if wrappers.strip(keys).keys == way.keys:
            return made("strip-prefix", "stripped")
        if way.removed and wrappers.strip(keys, prefix=way.removed).keys == way.keys:
            return made("strip-prefix", "stripped", way.removed)
    if way.added and wrappers.add(keys, way.added).keys == way.keys:
        return made("add-prefix", "prefixed", way.added)
    return None

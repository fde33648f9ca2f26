"""Tensors that a target's shapes make of what is in files: flat parameters that are split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.door import beside
from ckptfix.edit import flat
from ckptfix.errors import UnsupportedError
from ckptfix.hints import Hint, command

if TYPE_CHECKING:
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.match.target import Target
    from ckptfix.tree.document import Document


def made_for(document: Document, state: StateDict, wanted: Target) -> StateDict:
    """The state dict with the tensors that the shapes of a target make of it."""
    told = flat.Wanted(
        wanted.name, wanted.specs_for(state), wanted.buffers, wanted.ties, wanted.in_order
    )
    return flat.split(state, told)


def refusal(document: Document, state: StateDict, *, fits: bool) -> UnsupportedError | None:
    """Why a state dict does not fit, where it is for what could not be made of its files."""
    unmade = {} if fits else state.unmade
    if not unmade:
        return None
    key, why = next(iter(unmade.items()))
    more = f" (and {len(unmade) - 1} more)" if len(unmade) > 1 else ""
    return UnsupportedError(
        f"{key} cannot be split into parameters: {why}{more}",
        where=document.name,
        hint=Hint(
            "name the very model that was trained",
            command("fix", document.name, beside(document, "fixed"), model="FILE.py:NAME"),
        ),
        code="flat-parameters",
    )

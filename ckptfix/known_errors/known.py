"""The record of one known error."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ckptfix.hints import Command


class Known(NamedTuple):
    """One known error, and what repairs it.

    In a command, FILE stands for the checkpoint, OUT for the new file, M for a model, and PREFIX,
    SELECT and the like for what the text names.
    """

    code: str
    says: tuple[str, ...]
    """What its texts have in common, each as it is printed; `…` stands for anything in the same
    message. Empty where the lists of keys in a text tell it: see `diagnose.pasted_keys`."""
    cause: str
    cure: Command | str
    """A command; a sentence where no command helps."""
    example: str
    """The text as its library prints it, or the part that matters."""

    @property
    def said(self) -> str:
        """The cure for a page: a command in backquotes, a sentence as it is."""
        return self.cure if isinstance(self.cure, str) else f"`{self.cure}`"

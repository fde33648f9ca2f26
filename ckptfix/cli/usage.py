"""What is said where the command line itself is wrong: the usage error, and the way to the help."""

from __future__ import annotations

import click

from ckptfix.hints import Hint, command, shell


class Misuse(click.UsageError):
    """Arguments that do not go together; `hint` says which would."""

    def __init__(
        self, message: str, hint: Hint | None = None, context: click.Context | None = None
    ) -> None:
        super().__init__(message, context)
        self.hint = hint


def see_help(verb: str | None) -> Hint:
    """The hint where there is no better one: the help of a verb, or of the program."""
    return Hint(
        "see how it is used", command(verb, help=True) if verb else shell("ckptfix", "--help")
    )


def hint_for(error: click.UsageError) -> Hint:
    """The hint of a usage error: its own, or the help of the verb that it happened in."""
    own = getattr(error, "hint", None)
    if isinstance(own, Hint):
        return own
    is_verb = error.ctx is not None and error.ctx.parent is not None
    return see_help(error.ctx.info_name if error.ctx is not None and is_verb else None)

"""`ckptfix rename`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptfix.cli import options, paths, writing
from ckptfix.edit import edits
from ckptfix.keys import wrappers

if TYPE_CHECKING:
    from ckptfix.keys.renaming import Renaming


@click.command("rename", cls=paths.Verb)
@writing.edits
@options.select_many
@click.option(
    "--sub",
    "pairs",
    metavar="RE REPL",
    nargs=2,
    multiple=True,
    required=True,
    help="Replace what RE matches in a key by REPL, as Python's re.sub does (may be repeated; "
    "each works on what the one before it left).",
)
def command(
    job: writing.Job,
    select: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
) -> int:
    r"""Rename keys of state dicts by regular expressions.

    RE may match anywhere in a key; `^` and `$` tie it to an end. Modules in `_metadata` and an
    optimizer that is keyed by names are renamed with the keys. Two keys that would become one are
    an error. Everything else in IN is carried along. --to or the
    extension of OUT names its container.

    \b
    Examples:
      ckptfix rename old.pt new.pt --sub '^backbone\.' 'encoder.'
      ckptfix rename old.pt new.pt --sub 'gamma$' weight --sub 'beta$' bias
      ckptfix rename --in-place model.pt --sub '^net\.' ''
    """
    document = job.open()
    states = job.states(document, select)
    with job.naming_the_source():
        found = [(state, wrappers.substitute_in_turn(state.mapping, pairs)) for state in states]
    changes = [(state, renaming) for state, renaming in found if renaming.changed]
    if not changes:
        return job.nothing(f"no key matches {' or '.join(repr(pattern) for pattern, _ in pairs)}")
    return job.finish_renamed(edits.rename(document, changes), changes, _example(changes[0][1]))


def _example(renaming: Renaming) -> str:
    old, new = next(pair for pair in renaming.keys.items() if pair[0] != pair[1])
    return f"{old} -> {new}" + (", …" if renaming.changed > 1 else "")

"""`ckptfix strip-prefix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptfix.cli import options, output, paths, writing
from ckptfix.contents.state_dicts import choose_all
from ckptfix.edit import edits
from ckptfix.errors import KeyCollisionError, PartialPrefixError
from ckptfix.keys import wrappers

if TYPE_CHECKING:
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.keys.renaming import Renaming


@click.command("strip-prefix", cls=paths.Verb)
@writing.edits
@options.select_many
@click.option("--prefix", metavar="TEXT", help="Remove this prefix instead, such as model.")
@click.option("--partial", is_flag=True, help="Strip the keys that have it, though others do not.")
def command(
    job: writing.Job,
    select: tuple[str, ...],
    prefix: str | None,
    partial: bool,
) -> int:
    r"""Remove what DataParallel and other wrappers put before keys.

    `module.` and Opacus' `_module.` go where every key of a state dict begins with them;
    `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module` and `_forward_module` go
    wherever they stand. Everything else in IN is carried along: optimizer, epoch, objects of any
    class. --to or the extension of OUT names its container.

    \b
    Examples:
      ckptfix strip-prefix ddp.pt plain.pt
      ckptfix strip-prefix --in-place ddp.pt

    \b
    Exit codes:
      0  OUT was written, or IN was changed in place
      1  there is nothing to strip; nothing was written
      2  IN cannot be read, or only some keys carry the prefix, or two keys
         would become one, or OUT cannot be written; nothing was written
    """
    document = job.open()
    states = choose_all(document, select)
    with job.naming_the_source():
        found = [
            (state, wrappers.strip(state.mapping, prefix=prefix, partial=partial))
            for state in states
        ]
        changes = [(state, renaming) for state, renaming in found if renaming.changed]
        if not changes and prefix is None and not partial:
            _explain(states)
    if not changes:
        what = f"no key begins with {prefix!r}" if prefix else "no key has a wrapper's prefix"
        return job.nothing(what)
    code = job.finish_renamed(edits.rename(document, changes), changes)
    if prefix is None and not partial:
        _say_kept(found)
    return code


def _explain(states: list[StateDict]) -> None:
    """Refuse, where wrappers are there and cannot be stripped: silence would hide them."""
    for state in states:
        seen = wrappers.detect(state.mapping)
        if seen.collision is not None:
            first, second = seen.collision
            raise KeyCollisionError(first, second, second.removeprefix("module."))
        if seen.own_child:
            raise PartialPrefixError("module.", seen.carrying, seen.lacking)


def _say_kept(found: list[tuple[StateDict, Renaming]]) -> None:
    """Name the state dicts whose `module` stays, since only some of their keys have it."""
    for state, renaming in found:
        if not any(new.startswith("module.") for new in renaming.keys.values()):
            continue
        carrying, lacking = wrappers.own_children(state.mapping)
        if carrying:
            where = "" if state.path == "/" else f" in {state.path}"
            total = len(carrying) + len(lacking)
            output.note(
                f"{len(carrying)} of {total} keys keep their 'module.'{where}: "
                f"{lacking[0]!r} has none"
            )

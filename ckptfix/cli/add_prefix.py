"""`ckptfix add-prefix`."""

from __future__ import annotations

import click

from ckptfix.cli import options, paths, writing
from ckptfix.contents.state_dicts import choose
from ckptfix.edit import edits
from ckptfix.keys import wrappers


@click.command("add-prefix", cls=paths.Verb)
@writing.edits
@options.select
@click.option("--prefix", metavar="TEXT", default="module.", show_default=True, help="What to add.")
def command(
    job: writing.Job,
    select: str | None,
    prefix: str,
) -> int:
    r"""Put `module.` or another prefix before every key of a state dict.

    For a model that is wrapped in DataParallel or DDP before the checkpoint is loaded. Everything
    else in IN is carried along. --to or the
    extension of OUT names its container.

    \b
    Examples:
      ckptfix add-prefix plain.pt ddp.pt
      ckptfix add-prefix --in-place plain.pt
    """
    document = job.open()
    state = choose(document, select)
    with job.naming_the_source():
        changes = [(state, wrappers.add(state.mapping, prefix))]
    if not changes[0][1].changed:
        return job.nothing("an empty prefix changes no key")
    return job.finish_renamed(edits.rename(document, changes), changes)

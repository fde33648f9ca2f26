"""`ckptfix recover`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ckptfix.cli import options, output, paths, reading, writing
from ckptfix.contents.state_dicts import choose
from ckptfix.match import judge
from ckptfix.repair.recover import Recovered, recover
from ckptfix.words import plural

if TYPE_CHECKING:
    from ckptfix.edit.counting import Held

_SHOWN = 20


@click.command("recover", cls=paths.Verb)
@writing.writes
@options.target
@options.select
@click.option(
    "--archive",
    type=click.IntRange(min=1),
    metavar="N",
    help="The save to take where IN holds several, one after another; without it they are listed.",
)
def command(
    job: writing.Job,
    model: str | None,
    init: str | None,
    like: str | None,
    select: str | None,
    archive: int | None,
) -> int:
    r"""Save what can be saved from a checkpoint that is cut short or damaged.

    Every tensor whose bytes are whole is written to OUT; every one that is lost is named. Nothing
    is filled in. With a model, or a checkpoint of the same model, what OUT lacks is listed. Several
    saves in one file are never mixed: they are listed by where they begin, and one is taken by its
    number.

    \b
    Examples:
      ckptfix recover broken.pt saved.pt
      ckptfix recover two-saves.pt second.pt --archive 2
    """
    wanted = options.wanted(model, init, like)
    job.check()
    found = recover(job.source, archive)
    reading.say_notes(job.given(found.document).notes)
    missing: list[str] = []
    if wanted is not None:
        missing = judge.as_it_stands(found.document, choose(found.document, select), wanted).missing
    document, left_out = job.reduced(found.document, select)
    found = replace(found, document=document)
    _say(job.source, found, missing)
    data = {
        "unchecked": found.unchecked,
        "lost": found.lost,
        "missing": missing,
        "steps": found.steps,
    }

    def done(held: Held) -> str:
        return f"{plural(held.tensors, 'tensor')} saved, {len(found.lost):,} lost"

    return job.finish(
        document,
        done,
        data,
        left_out=left_out,
        count="saved",
        exit_code=1 if found.lost or missing else 0,
    )


def _say(source: str, found: Recovered, missing: list[str]) -> None:
    """Tell people what JSON has fields for."""
    if output.is_json():
        return
    for step in found.steps:
        output.note(f"{source}: {step}")
    for label, names in (("lost", found.lost), ("missing", missing)):
        for name in names[:_SHOWN]:
            output.note(f"{source} ({name}): {label}")
        if len(names) > _SHOWN:
            told = output.more(len(names) - _SHOWN, "--json has all")
            output.note(f"{source}: {label}: {told}")
    if found.unchecked:
        count = plural(found.unchecked, "tensor")
        output.note(f"{source}: {count} saved from storages without checksums, not verified")

"""`ckptfix fix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix.cli import options, output, writing
from ckptfix.diagnose import damage
from ckptfix.repair.plan import Plan, plan
from ckptfix.tree.document import Tensor
from ckptfix.tree.walk import walk
from ckptfix.words import plural

if TYPE_CHECKING:
    from rich.console import Console


@click.command("fix")
@writing.writes
@options.target
@options.select
@click.option("--keep-training-state", is_flag=True, help="Repair the weights where they are.")
def command(
    job: writing.Job,
    model: str | None,
    init: str | None,
    like: str | None,
    select: str | None,
    keep_training_state: bool,
) -> int:
    r"""Find what is wrong with a checkpoint, and repair it.

    Without a model, only what is certain is repaired: wrappers that every key carries, device tags,
    the container; everything else is carried along. With a model, or a checkpoint that loads, OUT
    is a state dict that load_state_dict takes strictly: prefixes are stripped, added or exchanged,
    the part of a larger model that is meant is taken out, and what the model does not want is
    dropped, by name. Averages (EMA, SWA) are taken only where nothing else fits, or by --select.

    \b
    Examples:
      ckptfix fix trained.pt fixed.pt
      ckptfix fix trained.pt fixed.pt --model net.py:Net --init '{"layers": 3}'

    \b
    Exit codes:
      0  OUT was written
      1  there is nothing to repair; nothing was written
      2  IN cannot be read, or cannot be made to fit (a key is missing, a shape
         differs, two ways fit, or two keys would become one), or OUT cannot be
         written; nothing was written
    """
    wanted = options.wanted(model, init, like)
    document = job.open()
    made = plan(
        document,
        wanted,
        select=select,
        keep_training_state=keep_training_state,
        tensors_only=job.container.tensors_only,
    )
    if not made.cures and document.container == job.container.name:
        if not job.dry_run:  # nothing is copied, so nothing else reads it
            damage.check_sums(document)
        return job.nothing("nothing to repair")
    if made.cures:
        output.aside(lambda console: _draw(console, made))
    _say_keys("dropped", made.dropped)
    _say_keys("of another dtype; torch casts them as it loads", made.of_another_dtype)
    tensors = sum(isinstance(node, Tensor) for _, node in walk(made.document.root))
    data = {**_data(made), "copied": tensors}
    return job.finish(made.document, _summary(made, tensors), data, left_out=made.left_out)


def _summary(made: Plan, tensors: int) -> str:
    """What was done, in one line. Nothing is ever cast, which is told with the rest."""
    left = plural(len(made.left_out), "thing") if made.left_out else "nothing"
    return (
        f"{plural(tensors, 'tensor')} copied, {len(made.renamed) or 'none'} renamed, "
        f"none cast, {len(made.dropped) or 'none'} dropped, {left} left behind"
    )


def _say_keys(what: str, keys: list[str]) -> None:
    if keys:
        output.note_names(f"{plural(len(keys), 'key')} {what}", keys)


def _data(made: Plan) -> dict[str, Any]:
    return {
        "plan": [row._asdict() for row in made.cures],
        "renamed": dict(made.renamed),
        "dropped": made.dropped,
        "of_another_dtype": made.of_another_dtype,
    }


def _draw(console: Console, made: Plan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("found", "where", "what", "cure"):
        table.add_column(title, overflow="fold", header_style="bold")
    for row in made.cures:
        table.add_row(*map(output.printable, row))
    console.print(table)

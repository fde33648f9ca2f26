"""`ckptfix fix`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix.cli import options, output, paths, rows, writing
from ckptfix.cli.usage import Misuse
from ckptfix.contents.state_dicts import find, of_models
from ckptfix.diagnose.document import without_weights
from ckptfix.formats import embedded
from ckptfix.repair.plan import Plan, plan
from ckptfix.words import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from ckptfix.cli import answers
    from ckptfix.edit.counting import Held
    from ckptfix.findings import Finding
    from ckptfix.repair.plan import Cure, Remaining
    from ckptfix.tree.document import Document


@click.command("fix", cls=paths.Verb)
@writing.writes
@options.target
@options.select
@options.average
@click.option(
    "--untie", is_flag=True, help="Write tied tensors under each name, where OUT is safetensors."
)
@click.option("--keep-training-state", is_flag=True, help="Repair the weights where they are.")
@options.drop
@click.option(
    "--apply-masks", is_flag=True, help="Multiply pruned weights by their masks (…_orig, …_mask)."
)
@click.option(
    "--keep-dangerous", is_flag=True, help="Carry along what runs commands where it is unpickled."
)
def command(
    job: writing.Job,
    model: str | None,
    init: str | None,
    like: str | None,
    select: str | None,
    average: bool,
    untie: bool,
    keep_training_state: bool,
    drop: tuple[str, ...],
    apply_masks: bool,
    keep_dangerous: bool,
) -> int:
    r"""Find what is wrong with a checkpoint, and repair it.

    Without a model, only what is certain is repaired: wrappers that every key carries, device tags,
    the container; everything else is carried along. With a model, or a checkpoint that loads, OUT
    is a state dict that load_state_dict takes strictly: prefixes are stripped, added or exchanged,
    the part of a larger model that is meant is taken out, and what the model does not want is
    dropped, by name. Averages (EMA, SWA) are taken only where nothing else fits, or by --average.
    Keys that change what others mean (LoRA, masks, scales) are dropped only by --drop. Where
    nothing is wrong, OUT is a copy.
    safetensors holds a tied tensor once, under one of its names; --untie writes it under each.
    What would run commands or code where it is unpickled is left out, by name.

    \b
    Examples:
      ckptfix fix trained.pt fixed.pt
      ckptfix fix trained.pt fixed.pt --model net.py:Net --init '{"layers": 3}'
    """
    wanted = options.wanted(model, init, like)
    if untie and wanted is None:
        raise Misuse("--untie is for --model or --like, and neither is given")
    document, select = embedded.taken(job.open(), select)
    made = plan(
        document,
        wanted,
        select=select,
        average=average,
        keep_training_state=keep_training_state,
        keep_dangerous=keep_dangerous,
        apply_masks=apply_masks,
        drop=drop,
        tensors_only=job.container.tensors_only,
        untie=untie,
    )
    for found in _beyond_repair(made.document):
        output.note(f"{found.message}: nothing repairs that")
    _say_written_once(made)
    _say_keys("whose values change as torch loads them", made.changes)
    if made.cures:
        output.aside(lambda console: _draw(console, made))
    job.list_renamed([(path, renaming.changes) for path, renaming in made.renamings])
    _say_keys("dropped", made.dropped)
    _say_keys("of another dtype; torch casts them as it loads", made.of_another_dtype)
    _say_remaining(document.name, made)
    _say_keys("may be transposed, which a square weight does not tell", made.unseen)

    def done(held: Held) -> str:
        return _summary(made, held, len(made.left_out) + job.files_left)

    return job.finish(
        made.document,
        done,
        _data(made),
        left_out=made.left_out,
        count="copied",
        exit_code=1 if _errors_left(made) else 0,
    )


def _summary(made: Plan, held: Held, left_out: int) -> str:
    """What was done, in one line. Nothing is ever cast, which is told with the rest."""
    left = plural(left_out, "thing") if left_out else "nothing"
    if not made.cures:
        verb = "could" if _errors_left(made) else "had to"
        copied = plural(held.tensors, "tensor")
        return f"nothing {verb} be repaired; {copied} copied, {left} left behind"
    return (
        f"{plural(held.tensors, 'tensor')} copied, {_keys(made.keys_renamed)} renamed, none cast, "
        f"{_keys(len(made.dropped))} dropped, {left} left behind"
    )


def _errors_left(made: Plan) -> bool:
    return any(row.is_error for row in made.remaining)


def _keys(count: int) -> str:
    return plural(count, "key") if count else "no key"


def _say_remaining(name: str, made: Plan) -> None:
    """What is left as it is, and why; JSON has a field for it."""
    for row in () if output.is_json() else made.remaining:
        where = "" if row.where == "/" else f" ({row.where})"
        output.note(f"{name}{where}: left as it is: {row.found}; {row.reason}")


def _beyond_repair(document: Document) -> Iterator[Finding]:
    for state in of_models(find(document.root)):
        yield from without_weights(state)


def _say_written_once(made: Plan) -> None:
    if made.written_once:
        size = output.size(made.untying)
        output.note(
            "safetensors.torch.load_model(model, OUT) loads that, load_state_dict(load_file(OUT)) "
            f"lacks a key; --untie writes both, which takes {size} more"
        )


def _say_keys(what: str, keys: list[str]) -> None:
    if keys:
        output.note_names(f"{plural(len(keys), 'key')} {what}", keys)


def _data(made: Plan) -> dict[str, Any]:
    return {
        "plan": [_cure(row) for row in made.cures],
        "remaining": [_remaining(row) for row in made.remaining],
        "renamed": [rows.renamed(path, way, way.changes) for path, way in made.renamings],
        "dropped": made.dropped,
        "of_another_dtype": made.of_another_dtype,
        "values_change": made.changes,
        "may_be_transposed": made.unseen,
    }


def _cure(row: Cure) -> answers.Cure:
    return {"code": row.code, "where": row.where, "message": row.found, "cure": row.cure}


def _remaining(row: Remaining) -> answers.Remaining:
    return {"code": row.code, "where": row.where, "message": row.found, "reason": row.reason}


def _draw(console: Console, made: Plan) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("found", "where", "what", "cure"):
        table.add_column(title, overflow="fold", header_style="bold")
    for row in made.cures:
        table.add_row(*map(output.printable, row))
    console.print(table)

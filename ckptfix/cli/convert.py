"""`ckptfix convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptfix.cli import casts, options, output, paths, writing
from ckptfix.contents.state_dicts import choose, choose_all
from ckptfix.edit import casting, compacting, reduce
from ckptfix.edit.weights_only import weights_only
from ckptfix.formats import embedded

if TYPE_CHECKING:
    from ckptfix.edit.counting import Held


@click.command("convert", cls=paths.Verb)
@writing.writes
@options.select
@options.average
@options.max_shard_size
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors: float16, bf16, …")
@click.option("--weights-only", "bare", is_flag=True, help="Keep the tensors of one state dict.")
@click.option(
    "--compact/--no-compact",
    help="Cut storages to what their tensors use. [.safetensors: always]",
)
def command(
    job: writing.Job,
    select: str | None,
    average: bool,
    dtype: str | None,
    bare: bool,
    compact: bool,
) -> int:
    r"""Write a checkpoint in another container: .pt, .bin, .ckpt, .safetensors or a folder.

    A .pt file keeps everything, or only --select. A .safetensors file holds one state dict and
    nothing else: what is left out (optimizer, epoch, values that are not tensors) is named. With
    --weights-only a .pt file holds as much, for torch.load(weights_only=True). An OUT that ends in
    / becomes a folder of .safetensors files and their index, as Hugging Face's libraries load it;
    with --to dcp one that torch.distributed.checkpoint loads, which keeps everything. From a
    folder, config, tokenizer and other texts go along. What -f removes there is named.

    --dtype casts the floating-point tensors of state dicts, nothing else: integers, complex and
    quantized tensors and an optimizer stay. Values that overflow, underflow or are NaN are counted.
    --compact cuts a storage of which tensors use a part; those that share one still do.

    \b
    Examples:
      ckptfix convert model.pt model.safetensors
      ckptfix convert old_legacy.pt new.pt
      ckptfix convert model.pt folder/ --max-shard-size 2GB
      ckptfix convert model.pt folder/ --to dcp
      ckptfix convert training.ckpt weights.pt --weights-only --dtype bfloat16
    """
    wanted = None if dtype is None else casting.dtype_of(dtype)
    document, select = embedded.taken(job.open(), select)
    container = job.container
    data: dict[str, Any] = {"container": document.container}
    left_out: list[tuple[str, str]] = []
    said = ""
    alone = bare or container.tensors_only
    if average:
        document, select = options.averages(document, select)
    elif alone and select is None:
        options.say_averages(document)
    if bare or (select is not None and not container.tensors_only):
        state = choose(document, select)
        fitted = weights_only(document, state) if bare else reduce.only(document, state)
        document, left_out, select = fitted.document, fitted.left_out, None
    if wanted is not None:
        states = [choose(document, select)] if container.tensors_only else choose_all(document)
        said = casts.said(states, wanted)
        document = casting.cast(document, states, wanted)
    if compact and not container.tensors_only:
        document, data["saved_bytes"] = compacting.compact(document)

    def after() -> dict[str, Any]:
        if wanted is None:
            return {}
        written = job.reduced(document, select).document
        return {"cast": casts.report(written, wanted, dry_run=job.dry_run)}

    def done(held: Held) -> str:
        return _said(held, said, data, container.name)

    return job.finish(document, done, data, select, left_out=left_out, after=after)


def _said(held: Held, cast: str, data: dict[str, Any], container: str) -> str:
    done = f"{data['container']} to {container}, {held}"
    if "saved_bytes" in data:
        done += f", {output.size(data['saved_bytes'])} of unused storage left out"
    return f"{done}, {cast}" if cast else done

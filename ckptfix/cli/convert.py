"""`ckptfix convert`."""

from __future__ import annotations

import click

from ckptfix import formats
from ckptfix.cli import options, output
from ckptfix.cli.writing import Job
from ckptfix.state_dicts import find


@click.command("convert")
@options.writes
@options.select
def command(source: str, target: str, force: bool, dry_run: bool, select: str | None) -> int:
    r"""Write a checkpoint in another container: .pt, .pth, .bin, .ckpt or .safetensors.

    A .pt file keeps everything, or only --select. A .safetensors file holds one state dict and
    nothing else: what is left out (optimizer, epoch, values that are no tensors) is named.

    \b
    Examples:
      ckptfix convert model.pt model.safetensors
      ckptfix convert old_legacy.pt new.pt

    \b
    Exit codes:
      0  OUT was written
      2  IN cannot be read, or holds several state dicts (name one with
         --select), or OUT cannot hold it; nothing was written
    """
    job = Job("convert", source, target, force, dry_run)
    document = job.open()
    container = formats.writable(target).name
    tensors = sum(len(state.tensors) for state in find(document.root) if state.role != "optimizer")
    done = f"{document.container} to {container}, {output.plural(tensors, 'tensor')}"
    return job.write(document, done, {"from": document.container, "to": container}, select)

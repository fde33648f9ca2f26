"""`ckptfix to-cpu`."""

from __future__ import annotations

import click

from ckptfix.cli import paths, writing
from ckptfix.edit import edits
from ckptfix.words import plural


@click.command("to-cpu", cls=paths.Verb)
@writing.edits
def command(job: writing.Job) -> int:
    r"""Tag every storage `cpu`, so that it loads where there is no GPU.

    Only the tags change: keys, values and everything else in IN are carried along, `torch.device`
    values among hyper-parameters too. --to or the
    extension of OUT names its container.

    \b
    Examples:
      ckptfix to-cpu gpu.pt cpu.pt
      ckptfix to-cpu --in-place gpu.pt
    """
    document, left_out = job.reduced(job.open())
    document, tags = edits.to_cpu(document)
    if not tags:
        return job.nothing("every storage is on the CPU already")
    moved = ", ".join(f"{count} from {tag}" for tag, count in tags.items())
    done = f"{plural(tags.total(), 'storage')} tagged cpu ({moved})"
    return job.finish(document, done, {"retagged": dict(tags)}, left_out=left_out)

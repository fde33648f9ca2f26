"""Folders of shards for tests: written as transformers writes them, and as ckptfix does."""

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckptfix import door
from ckptfix.edit import reduce

FIXTURES = Path(__file__).parents[2] / "fixtures"
INDEX = "model.safetensors.index.json"


def ckptfix_command(*arguments: object, cwd: Path | None = None) -> Any:
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def done(*arguments: object, cwd: Path | None = None) -> str:
    ran = ckptfix_command(*arguments, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return str(ran.stdout)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def described(
    state: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """A state dict as values that can be compared to the bit."""
    return {key: (value.dtype, value.shape, bits(value)) for key, value in state.items()}


def weights(seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    """A small DDP model with a tie, a transposed tensor, an integer, an empty one, `_metadata`."""
    made = torch.Generator().manual_seed(seed)
    embed = torch.randn(6, 5, generator=made)
    state: OrderedDict[str, torch.Tensor] = OrderedDict(
        {
            "module.embed.weight": embed,
            "module.wide.weight": torch.randn(9, 10, generator=made),
            "module.bn.num_batches_tracked": torch.tensor(7),
            "module.turned": torch.randn(3, 7, generator=made).t(),
            "module.half": torch.randn(11, generator=made).half(),
            "module.none": torch.empty(0, 4),
            "module.head.weight": embed,
        }
    )
    versions = {"": {"version": 1}, "module": {"version": 1}, "module.bn": {"version": 2}}
    state._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return state


def write_shards(
    folder: Path, *shards: dict[str, torch.Tensor], extension: str = ".safetensors", **changes: Any
) -> Path:
    """A folder as transformers writes it; `changes` replace or add entries of the index."""
    folder.mkdir(exist_ok=True)
    stem = "model" if extension == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}{extension}" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        if extension == ".safetensors":
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map, **changes}
    (folder / f"{stem}{extension}.index.json").write_text(json.dumps(content))
    return folder


def two_shards(folder: Path, **options: Any) -> Path:
    return write_shards(
        folder, {"a": torch.ones(2, 3), "b": torch.zeros(4)}, {"c": torch.arange(5)}, **options
    )


def edit_index(folder: Path, **changes: Any) -> Path:
    """Change entries of the weight map; None takes one out."""
    content = json.loads((folder / INDEX).read_text())
    merged = {**content["weight_map"], **changes}
    content["weight_map"] = {key: shard for key, shard in merged.items() if shard is not None}
    (folder / INDEX).write_text(json.dumps(content))
    return folder


def save(state: Any, folder: Path, size: int = 250, force: bool = False) -> Path:
    """Write a state dict as a folder of shards."""
    source = folder.parent / f"{folder.name}.source.pt"
    torch.save(state, source)
    fitted = reduce.fit(door.read(source), door.SHARDS)
    door.write(fitted.document, f"{folder}/", max_shard_size=size, force=force)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


DYING = """
import os, signal, sys
left = int(sys.argv[3])
def dying(call):
    def wrapped(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **keywords)
    return wrapped
for name in ("fsync", "link", "replace", "unlink", "open"):
    setattr(os, name, dying(getattr(os, name)))
"""
"""From here on a process kills itself at one of its calls that change files: its third argument."""

"""The inputs: `python benchmarks/inputs.py KIND AMOUNT FILE`, in a process of its own.

Checkpoints as a training run under DataParallel leaves them, of random numbers: a state dict of
weights and biases, keys that begin with `module.`, storages tagged `cuda:0`. KIND is `pt` or
`safetensors`, AMOUNT being the bytes of the weights, or `many`, AMOUNT being the number of tensors.

`rows`, `columns` and `many-pieces` are the same as torch.distributed.checkpoint saves them of four
ranks: folders of four files, in which each weight is cut into four along its rows or its columns.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

RANKS = 4
LARGEST = 64 << 20
"""Bytes of a weight, at most; a file has 16 weights or more."""


def layers(nbytes: int) -> OrderedDict[str, torch.Tensor]:
    """Weights of `nbytes` bytes in all, each with a bias of 4 KiB."""
    size = min(LARGEST, nbytes // 16)
    state_dict = OrderedDict()
    for index in range(nbytes // size):
        state_dict[f"module.layers.{index}.weight"] = noise(size).view(-1, 1024)
        state_dict[f"module.layers.{index}.bias"] = noise(4096)
    return state_dict


def small(number: int) -> OrderedDict[str, torch.Tensor]:
    """Tensors of 64 bytes, named as the experts of a mixture are."""
    names = (f"module.layers.{i // 80}.experts.{i % 80}.weight" for i in range(number))
    return OrderedDict((name, noise(64).view(4, 4)) for name in names)


def noise(nbytes: int) -> torch.Tensor:
    """A float32 tensor of random numbers below 2, none of them infinite or NaN."""
    bits = torch.randint(-(2**63), 2**63 - 1, (nbytes // 8,)) & ~0x4000000040000000
    return bits.view(torch.float32)


def save_pieces(state_dict: OrderedDict[str, torch.Tensor], dimension: int, path: str) -> None:
    """Save a state dict as so many ranks would, each tensor cut along a dimension."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.dcp_folders import along, save

    save(Path(path), state_dict, along(dimension, RANKS), thread_count=RANKS)


def main(kind: str, amount: str, path: str) -> None:
    torch.manual_seed(0)
    state_dict = (small if kind in ("many", "many-pieces") else layers)(int(amount))
    if kind in ("rows", "columns", "many-pieces"):
        save_pieces(state_dict, int(kind == "columns"), path)
        return
    if kind == "safetensors":
        save_file(state_dict, path)
        return
    torch.serialization.location_tag = lambda storage: "cuda:0"
    torch.save(state_dict, path)


if __name__ == "__main__":
    main(*sys.argv[1:])

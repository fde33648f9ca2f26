"""Torch loads a checkpoint into an FSDP2 model: `python -m tests.fsdp_loads FOLDER WHOLE RANKS`.

Each rank is a process of its own, joined by gloo. WHOLE is what a training run had, in one file:
`model`, `optimizer` by names of parameters, and `epoch`. The exit code is 0 where every tensor that
torch loads from FOLDER is that of WHOLE, to the bit.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from fixtures.make_pieces import Net
from tests.dcp_folders import same


def run(rank: int, world: int, port: int, folder: str, whole: str) -> None:
    """What one process does."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(1)
    model = Net()
    fully_shard(model.last, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "epoch": 0,
    }
    load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    model.load_state_dict(state["model"])
    found = {
        "model": full(model.state_dict()),
        "optimizer": full(get_optimizer_state_dict(model, optimizer)),
        "epoch": state["epoch"],
    }
    meant = torch.load(whole, weights_only=False)
    assert same(plain(found), plain(meant)), rank
    dist.barrier()
    dist.destroy_process_group()


def full(node: Any) -> Any:
    """A tree with every tensor whole."""
    if isinstance(node, DTensor):
        return node.full_tensor().detach()
    return {key: full(value) for key, value in node.items()} if isinstance(node, dict) else node


def plain(node: Any) -> Any:
    """A tree with every mapping a plain one, sorted."""
    if isinstance(node, dict):
        return {key: plain(node[key]) for key in sorted(node)}
    return [plain(value) for value in node] if isinstance(node, list) else node


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        chosen = free.getsockname()[1]
    ranks = int(sys.argv[3])
    spawn(run, (ranks, chosen, *sys.argv[1:3]), nprocs=ranks)

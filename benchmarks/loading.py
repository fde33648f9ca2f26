"""Loading inside a process that has torch already: `python benchmarks/loading.py FILE ROUNDS`.

Prints a JSON list of `[seconds of ckptfix.load_state_dict, seconds of torch.load]`, with
`mmap=True`. Both only map the weights; reading them from the disk is what a later use of a tensor
costs.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

import ckptfix

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds(load: Callable[[], Any]) -> float:
    began = time.perf_counter()
    loaded = load()
    taken = time.perf_counter() - began
    del loaded
    return taken


def main(path: str, rounds: int) -> None:
    def ours() -> Any:
        return ckptfix.load_state_dict(path, mmap=True)

    def theirs() -> Any:
        return torch.load(path, map_location="cpu", mmap=True)

    seconds(ours), seconds(theirs)  # what they import late, they import here
    print(json.dumps([[seconds(ours), seconds(theirs)] for _ in range(rounds)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

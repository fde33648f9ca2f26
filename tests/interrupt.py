"""Run `ckptfix` and kill it at its Nth call that changes a disk: `interrupt.py N SHARE ARGUMENT…`.

The Nth call of os.write, os.fsync or os.unlink does not happen, or a write only by SHARE (0 to 1)
of its bytes; SIGKILL ends the process. It ends by itself where there are fewer calls.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

CALLS = ("write", "fsync", "unlink")


def main(number: int, share: float) -> None:
    calls = 0

    def interrupting(name: str) -> Any:
        original = getattr(os, name)

        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "write" and share:
                    descriptor, data = arguments
                    original(descriptor, data[: int(len(data) * share)])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    from ckptfix.cli import main as ckptfix

    for name in CALLS:
        setattr(os, name, interrupting(name))
    ckptfix()


if __name__ == "__main__":
    _, number, share, *sys.argv[1:] = sys.argv
    main(int(number), float(share))

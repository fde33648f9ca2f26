"""One process, measured: wall time, CPU time, peak of anonymous memory, bytes written."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
INTERVAL = 0.003
"""Seconds between two looks at a process's memory."""


class RunError(Exception):
    """A program did not do its work; says what it said last."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one run: seconds on the clock, seconds of all cores, bytes. None where nothing tells.

    `written` is what the process asked the kernel to write, copies inside the kernel included.
    """

    wall: float
    cpu: float
    memory: int | None
    written: int | None


def run(words: list[str], folder: Path) -> Sample:
    """Run a program to its end and measure it, its children included, but for memory.

    Raises `RunError` where its exit code is not 0.
    """
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        child = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        watch = _Watch(child.pid)
        watch.start()
        # It stays a zombie, so that its accounts can still be read.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - began
        watch.stop()
        written = _written(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RunError(f"exit code {child.returncode}: {last}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, watch.peak, written)


class _Watch(threading.Thread):
    """Looks at the RssAnon of a process again and again; `peak` is the most it saw."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = PROC / str(pid) / "status"
        self._over = threading.Event()
        self.peak: int | None = None

    def run(self) -> None:
        while not self._over.wait(INTERVAL):
            found = _field(self._status, "RssAnon:")
            if found is not None:
                self.peak = max(self.peak or 0, found * 1024)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _written(pid: int) -> int | None:
    return _field(PROC / str(pid) / "io", "wchar:")


def _field(path: Path, name: str) -> int | None:
    """The number after a name in a file of /proc; None where there is no such file or line."""
    try:
        text = path.read_text("ascii", errors="replace")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name)), None)


def warm(path: Path) -> None:
    """Read a file, or those of a folder, once, so that they lie in the page cache."""
    buffer = bytearray(8 << 20)
    for one in path.iterdir() if path.is_dir() else [path]:
        with one.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def settle() -> None:
    """Wait until what earlier runs wrote is on the disk, so that it slows no later run."""
    os.sync()

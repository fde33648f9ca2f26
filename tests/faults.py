"""Run `ckptfix` with its Nth call that changes a disk made to fail, or killed at that call.

`python -m tests.faults` imports everything once and forks for each run it is asked for, so that
thousands of runs take minutes. Each call of `CALLS` is counted from 1; one that only reads is none.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.helpers import unmeasured

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CALLS = (
    "open", "write", "pwrite", "copy_file_range", "ioctl", "ftruncate", "fsync", "fchmod", "link",
    "replace", "unlink", "mkdir", "rmdir",
)  # fmt: skip
_UNDOING = ("unlink", "rmdir")
_BEFORE = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP} if hasattr(signal, "SIGSTOP") else {}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Kind = Literal["none", "fail", "fail on", "short", "kill", "tear", "kill after", "stop"]
"""`fail`: that call raises. `fail on`: so do all after it, but for those that remove files; a full
disk lets one remove. `short`: it does half of what it was asked to. `tear`: it does half, and the
process is killed then. `stop`: it waits there for SIGCONT."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the call of that number."""

    kind: Kind = "none"
    number: int = 0
    code: int = 0

    def __str__(self) -> str:
        name = f" {errno.errorcode[self.code]}" if self.code else ""
        return f"{self.kind}{name} at call {self.number}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; `calls` are those that were counted, if it was not killed."""

    code: int
    killed: bool
    calls: list[str]
    stderr: str


class Runner:
    """A process that has imported ckptfix and forks for each run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=unmeasured(),
        )

    def run(
        self, arguments: Sequence[str | Path], cwd: Path, fault: Fault | None = None
    ) -> Outcome:
        """Run one command in a folder."""
        wanted = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "fault": asdict(fault or Fault()),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Stopped:
    """A command that stops at its Nth call, until it is told to go on."""

    def __init__(self, arguments: Sequence[str | Path], number: int, told: Path) -> None:
        command = [sys.executable, "-m", "tests.faults", str(number), *map(str, arguments)]
        self._told = told
        with told.open("wb") as stream:
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=stream, cwd=Path(__file__).parents[1]
            )
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        self.stopped = os.WIFSTOPPED(status)
        if not self.stopped:
            self._process.returncode = os.waitstatus_to_exitcode(status)

    def go_on(self) -> tuple[int, str]:
        """Let it run to its end; returns its exit code and what it said."""
        if self.stopped:
            self._process.send_signal(signal.SIGCONT)
        return self._process.wait(), self._told.read_text()


# --- inside that process


def _serve() -> None:
    import ckptfix

    for module in pkgutil.walk_packages(ckptfix.__path__, "ckptfix."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for line in sys.stdin:
        wanted = json.loads(line)
        outcome = _in_a_child(wanted["arguments"], wanted["cwd"], Fault(**wanted["fault"]))
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()


def _in_a_child(arguments: list[str], cwd: str, fault: Fault) -> Outcome:
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as counted:
        child = os.fork()
        if not child:
            os.dup2(told.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.chdir(cwd)
            os._exit(_run(arguments, fault, counted.fileno()))
        _, status = os.waitpid(child, 0)
        told.seek(0)
        counted.seek(0)
        calls = counted.read().decode().split()
        stderr = told.read().decode()
    return Outcome(os.waitstatus_to_exitcode(status), os.WIFSIGNALED(status), calls, stderr)


def _run(arguments: list[str], fault: Fault, counted: int) -> int:
    from ckptfix.cli import main

    write, calls = os.write, list[str]()
    _make_faulty(fault, calls)
    sys.argv = ["ckptfix", *arguments]
    code = 70
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    sys.stderr.flush()
    write(counted, " ".join(calls).encode())
    return code


def _make_faulty(fault: Fault, calls: list[str]) -> None:
    for name in CALLS:
        module = fcntl if name == "ioctl" else os
        setattr(module, name, _faulty(name, getattr(module, name), fault, calls))


def _faulty(
    name: str, original: Callable[..., Any], fault: Fault, calls: list[str]
) -> Callable[..., Any]:
    lock = threading.Lock()

    def call(*arguments: Any, **keywords: Any) -> Any:
        if name == "open" and not arguments[1] & _WRITING:
            return original(*arguments, **keywords)
        with lock:  # workers call too
            calls.append(name)
            number = len(calls)
        later = fault.kind == "fail on" and number > fault.number and name not in _UNDOING
        if number != fault.number and not later:
            return original(*arguments, **keywords)
        if fault.kind.startswith("fail"):
            raise OSError(fault.code, os.strerror(fault.code))
        if fault.kind in _BEFORE:
            os.kill(os.getpid(), _BEFORE[fault.kind])
        half = _half(name, arguments) if fault.kind in ("short", "tear") else arguments
        try:
            return original(*half, **keywords)
        finally:
            if fault.kind in ("tear", "kill after"):
                os.kill(os.getpid(), signal.SIGKILL)

    return call


def _half(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if name in ("write", "pwrite"):
        descriptor, data, *rest = arguments
        return (descriptor, data[: (len(data) + 1) // 2], *rest)
    if name == "copy_file_range":
        source, target, count, *rest = arguments
        return (source, target, (count + 1) // 2, *rest)
    return arguments


def _stop_at(number: int) -> None:
    from ckptfix.cli import main

    _make_faulty(Fault("stop", number), [])
    main()


if __name__ == "__main__":
    if sys.argv[1:]:
        _, number, *sys.argv[1:] = sys.argv
        _stop_at(int(number))
    else:
        _serve()

"""Where a benchmark ran: processor, memory, file system, kernel, versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("ckptfix", "torch", "safetensors", "isal")
PEERS = ("huggingface_hub", "mergekit", "sft-cli")


def describe(folder: Path) -> dict[str, Any]:
    """The machine, and the file system that a folder lies on."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "file_system": _file_system(folder),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions(peers: str) -> dict[str, str]:
    """Versions of Python, of cp and of the packages that took part, where they are installed."""
    found = {"python": platform.python_version(), "cp": _version_of_cp()}
    return found | _packages(sys.executable, PACKAGES) | _packages(peers, PEERS)


def _packages(python: str, names: tuple[str, ...]) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def _version_of_cp() -> str:
    done = subprocess.run(["cp", "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].removeprefix("cp ") or "of the system"


def _first(path: str, name: str) -> str | None:
    """The value of the first `name: value` in a file of /proc."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def available_memory() -> int:
    """Bytes that a process could take now; all there are where the system does not say."""
    said = _first("/proc/meminfo", "MemAvailable")
    return int(said.removesuffix(" kB")) << 10 if said else _memory()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _file_system(folder: Path) -> str:
    """The type of the file system, as the mount nearest to the folder names it."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    real = folder.resolve()
    over = [mount for mount in mounts if real.is_relative_to(mount[1])]
    return max(over, key=lambda mount: len(mount[1]))[2] if over else "unknown"

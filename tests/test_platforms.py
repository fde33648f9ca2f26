"""The paths of other systems, simulated in real processes: same files, or a clear error.

macOS has no `copy_file_range`; Windows neither that nor `pread`, `fchmod` and `fcntl`, and lets
nobody open a folder, replace or remove a file that is open, or use a name such as `aux`. What is
taken away here is what `os` lacks there, and what is denied is what those systems deny.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from tests.conftest import FIXTURES
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")

WITHOUT = """
import errno, os, sys

def lacks(*names):
    for name in names:
        if hasattr(os, name):
            delattr(os, name)

def denied(name, denies, code=errno.EACCES):
    original = getattr(os, name)
    def call(*arguments, **keywords):
        if denies(*arguments):
            raise OSError(code, os.strerror(code), arguments[0])
        return original(*arguments, **keywords)
    setattr(os, name, call)

def is_open(path):
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.path.samefile(f"/proc/self/fd/{entry}", path):
                return True
        except OSError:
            pass
    return False
"""

SYSTEMS = {
    "macOS": """
lacks("copy_file_range", "posix_fadvise", "sendfile", "sched_getaffinity")
""",
    "Windows": """
lacks("copy_file_range", "posix_fadvise", "sendfile", "pread", "preadv", "pwrite", "pwritev",
      "fchmod", "O_NOFOLLOW", "O_NONBLOCK", "sysconf", "sched_getaffinity")
os.O_BINARY = 0
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None
denied("open", lambda path, *_: os.path.isdir(path))
denied("unlink", is_open)
denied("replace", lambda old, new, *_: is_open(old) or is_open(new))
denied("link", lambda old, new, *_: is_open(old))
""",
    "no hard links": """
denied("link", lambda *_: True, errno.EPERM)
""",
    "no folder sync": """
synced = os.fsync
def fsync(descriptor):
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.EINVAL, "no")
    synced(descriptor)
os.fsync = fsync
""",
    "no locks": """
import fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "no")
fcntl.flock = flock
""",
    "copies between file systems": """
denied("copy_file_range", lambda *_: True, errno.EXDEV)
""",
}
RUN = "\nfrom ckptfix.cli import main\nmain()\n"

JOBS = {
    "zip": ("dataparallel_cuda_training.pt", ["strip-prefix", "in", "out.pt"]),
    "legacy": ("legacy_dataparallel_cuda.pt", ["strip-prefix", "in", "out.pt"]),
    "to safetensors": ("dataparallel.pt", ["convert", "in", "out.safetensors"]),
    "from safetensors": ("dataparallel.safetensors", ["convert", "in", "out.pt"]),
    "replace": ("dataparallel.pt", ["fix", "in", "old.pt", "--force"]),
    "shards": ("dataparallel.pt", ["convert", "in", "out/", "--max-shard-size", "100"]),
    "in place": ("dataparallel_cuda_training.pt", ["strip-prefix", "in", "--in-place"]),
    "header in place": ("dataparallel.safetensors", ["strip-prefix", "in", "--in-place"]),
    "page": ("dataparallel.pt", ["inspect", "in", "--html", "page.html"]),
    "large": ("", ["strip-prefix", "in", "out.pt"]),
}


def on(
    system: str, arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    script = WITHOUT + SYSTEMS.get(system, "") + RUN
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        cwd=folder,
        env={**os.environ, **(environment or {})},
    )


def run_in(folder: Path, job: str, system: str) -> tuple[int, dict[str, bytes]]:
    name, arguments = JOBS[job]
    folder.mkdir()
    source = folder / f"in{Path(name).suffix or '.pt'}"
    if name:
        shutil.copy(FIXTURES / name, source)
    else:
        torch.manual_seed(0)
        torch.save({"module.w": torch.rand(900, 1000), "module.b": torch.rand(3)}, source)
    shutil.copy(FIXTURES / "cpu.pt", folder / "old.pt")
    ran = on(system, [source.name if word == "in" else word for word in arguments], folder)
    assert ran.returncode == 0, ran.stderr
    found = (path for path in folder.rglob("*") if path.is_file())
    return ran.returncode, {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_writes_the_same_files(
    system: str, job: str, tmp_path: Path, tally: Any
) -> None:
    here, there = run_in(tmp_path / "here", job, ""), run_in(tmp_path / "there", job, system)
    assert here[1].keys() == there[1].keys()
    assert here == there
    tally(f"commands on a simulated system: {system}")


@pytest.mark.parametrize("system", ["macOS", "Windows", "no locks", "no folder sync"])
def test_an_interrupted_edit_is_undone_on_every_system(system: str, tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    shutil.copy(FIXTURES / "dataparallel_cuda_training.pt", path)
    old = path.read_bytes()
    interrupt = Path(__file__).parent / "interrupt.py"
    for number in range(1, 6):
        command = [sys.executable, interrupt, number, "0.5", "strip-prefix", path, "--in-place"]
        subprocess.run([str(word) for word in command], check=False)
        ran = on(system, ["inspect", "in.pt"], tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert path.read_bytes() == old
        assert [child.name for child in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437"])
@pytest.mark.parametrize(
    "arguments", [["inspect", "name.pt"], ["check", "name.pt"], ["inspect", "--json", "name.pt"],
                  ["rename", "name.pt", "out.pt", "--sub", "é", "\u65e5"], ["--help"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_console_of_another_encoding_shows_what_it_can(
    encoding: str, arguments: list[str], tmp_path: Path
) -> None:
    torch.save({"é.\u65e5\u672c": torch.ones(2), "\U0001f600": torch.ones(2)}, tmp_path / "name.pt")
    ran = on("Windows", arguments, tmp_path, {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert ran.returncode in (0, 1)
    assert "Traceback" not in ran.stderr
    assert "report it" not in ran.stderr


def test_weights_are_loaded_without_what_windows_lacks(tmp_path: Path) -> None:
    script = (
        WITHOUT
        + SYSTEMS["Windows"]
        + "import torch, ckptfix\n"
        + "torch.save(dict(ckptfix.load_state_dict(sys.argv[1])), sys.argv[2])\n"
    )
    source, out = FIXTURES / "dataparallel.pt", tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", script, source, out], check=True)
    assert unlike(torch.load(out), dict(ckptfix.load_state_dict(source))) is None

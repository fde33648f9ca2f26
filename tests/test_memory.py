"""Memory: a large checkpoint is repaired in tens of megabytes, and its weights bypass Python."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptfix import api, door
from tests.dcp_folders import along, grid, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
LAYER = 16 * MIB


def ddp_checkpoint(path: Path, size: int) -> Path:
    """A checkpoint of `size` bytes saved under DataParallel, of weights in 16 MiB layers."""
    layers = {f"module.{index}.weight": layer(index) for index in range(size // LAYER)}
    torch.save({"model": layers, "epoch": 3}, path)
    return path


def layer(index: int) -> torch.Tensor:
    return torch.full((LAYER // 4,), float(index))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = ddp_checkpoint(tmp_path_factory.mktemp("large") / "ddp.pt", 256 * MIB)
    yield path
    path.unlink()


def peak_of_anonymous_memory(*arguments: str | Path) -> int:
    """The most bytes of RssAnon that a run of `ckptfix` was seen to have."""
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while child.poll() is None:
            peak = max(peak, anonymous_memory(child.pid))
            time.sleep(0.001)
        assert child.stderr is not None
        assert child.returncode == 0, child.stderr.read()
    return peak


def anonymous_memory(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = [line.split() for line in file if line.startswith("RssAnon:")]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(lines[0][1]) * 1024 if lines else 0  # a process that is ending has no such line


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@linux
def test_the_measure_sees_memory_that_is_used(large: Path) -> None:
    """Held against the pasted recipe, or the tests below could not fail."""
    program = (
        f"import torch; kept = torch.load({str(large)!r}); print('loaded', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"loaded\n"
        held = anonymous_memory(child.pid)
        child.stdin.write(b"\n")
    assert held > 256 * MIB


@linux
@pytest.mark.parametrize("verb", ["strip-prefix", "add-prefix", "convert"])
def test_64_mib_are_enough_for_256(verb: str, large: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.safetensors" if verb == "convert" else "out.pt")
    peak = peak_of_anonymous_memory(verb, large, out)
    out.unlink()
    assert 4 * MIB < peak < 64 * MIB


THREE = torch.tensor(3.0).numpy().tobytes()


@linux
@pytest.mark.parametrize("ranks", [along(0, 4), along(1, 4), grid(2, 2)])
@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
def test_64_mib_are_enough_for_256_in_pieces(ranks: Any, out: str, tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.full((4096, 4096), n, dtype=torch.float32) for n in range(4)}
    folder = save(tmp_path / "step", state, ranks, thread_count=4)
    peak = peak_of_anonymous_memory("convert", folder, tmp_path / out)
    assert 4 * MIB < peak < 64 * MIB
    found = door.read(tmp_path / out).root["3.weight"]
    assert found.storage.spans[0].slice(123 << 12, 4096).read() == THREE * 1024
    (tmp_path / out).unlink()
    shutil.rmtree(folder)


@linux
@pytest.mark.parametrize("before", [along(0, 4), along(1, 4)])
def test_64_mib_are_enough_to_write_pieces(before: Any, tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.full((4096, 4096), n, dtype=torch.float32) for n in range(4)}
    folder = save(tmp_path / "step", state, before, thread_count=4)
    out = tmp_path / "out"
    peak = peak_of_anonymous_memory("convert", folder, out, "--to", "dcp")
    assert 4 * MIB < peak < 64 * MIB
    found = door.read(out).root["3.weight"]
    assert found.storage.spans[0].slice(123 << 12, 4096).read() == THREE * 1024
    shutil.rmtree(out)
    shutil.rmtree(folder)


@linux
@pytest.mark.slow
def test_64_mib_are_enough_for_a_gib(tmp_path: Path) -> None:
    path = ddp_checkpoint(tmp_path / "ddp.pt", 1024 * MIB)
    peak = peak_of_anonymous_memory("strip-prefix", path, tmp_path / "out.pt")
    assert 4 * MIB < peak < 64 * MIB
    assert list(door.read(tmp_path / "out.pt").root["model"])[-1] == "63.weight"
    path.unlink()
    (tmp_path / "out.pt").unlink()


@linux
@pytest.mark.slow
def test_64_mib_are_enough_without_checksums(tmp_path: Path) -> None:
    """Then every byte is summed all the same, since the output has them."""
    torch.serialization.set_crc32_options(False)
    try:
        path = ddp_checkpoint(tmp_path / "ddp.pt", 256 * MIB)
    finally:
        torch.serialization.set_crc32_options(True)
    peak = peak_of_anonymous_memory("strip-prefix", path, tmp_path / "out.pt")
    assert 4 * MIB < peak < 64 * MIB
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None


class Counter:
    """Stands before the system's calls that move bytes through a process, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved = 0
        for name in ("read", "pread", "readv", "preadv", "write", "pwrite", "writev", "pwritev"):
            if hasattr(os, name):
                monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call: Any) -> Any:
        def counting(*args: Any) -> Any:
            result = call(*args)
            self.moved += len(result) if isinstance(result, bytes) else result
            return result

        return counting


def copies_in_the_kernel(folder: Path) -> bool:
    """Whether the system and the file system of the tests can do it at all."""
    (folder / "a").write_bytes(bytes(10))
    with (folder / "a").open("rb") as source, (folder / "b").open("wb") as target:
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), 10, 0) == 10
        except AttributeError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise


def test_weights_without_checksums_are_copied_by_the_kernel(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copies_in_the_kernel(tmp_path):
        pytest.skip("this file system does not copy inside the kernel")
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    api.open(large).save(source)
    counter = Counter(monkeypatch)
    api.open(source).strip_prefix().save(out)
    assert 0 < counter.moved < MIB
    monkeypatch.undo()
    assert out.stat().st_size > 256 * MIB
    span = door.read(out).root["5.weight"].storage.spans[0]
    assert span.slice(0, 64).read() == layer(5)[:16].numpy().tobytes()
    out.unlink()

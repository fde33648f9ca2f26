"""A file system that shares blocks, in a file: for tests that may mount one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KINDS = ("xfs", "btrfs")
_SIZE = 512 << 20  # the least that both can be made in


@contextmanager
def mounted(kind: str, folder: Path, size: int = _SIZE) -> Iterator[Path]:
    """A folder on a new file system of that kind; skips where there is no way to have one."""
    make = shutil.which(f"mkfs.{kind}") or shutil.which(f"mkfs.{kind}", path="/sbin:/usr/sbin")
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or make is None:
        pytest.skip(f"{kind} needs Linux, root and mkfs.{kind}")
    image, place = folder / f"{kind}.img", folder / kind
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([make, "-q", str(image)], check=True, capture_output=True)
    ran = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if ran.returncode != 0:
        pytest.skip(f"{kind} cannot be mounted here: {ran.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()


def written_sectors(place: Path) -> int:
    """How many sectors of 512 bytes were written to the disk below a mounted folder."""
    device = os.stat(place).st_dev
    counts = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"
    if not os.path.exists(counts):  # Btrfs has devices of its own
        with open("/proc/self/mountinfo") as rows:
            [name] = [
                row.split(" - ")[1].split()[1] for row in rows if row.split()[4] == str(place)
            ]
        counts = f"/sys/class/block/{os.path.basename(name)}/stat"
    with open(counts) as file:
        return int(file.read().split()[6])

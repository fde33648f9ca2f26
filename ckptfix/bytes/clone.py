"""Files that share blocks: XFS, Btrfs, bcachefs and APFS make a copy without copying.

A clone is a file of its own: what is written to either one is seen in that one only. Sources:
`ioctl_ficlonerange(2)`; `clonefile(2)` of macOS.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ckptfix.bytes.source import read_exactly, read_some

if TYPE_CHECKING:
    from ckptfix.bytes.source import FileSource

_FICLONE = 0x40049409

_SAMPLES, _SAMPLE = 64, 1 << 12
"""Pieces, and bytes of each, in which a clone is held against its source."""


def share(source: int, target: int) -> bool:
    """Whether the open, empty file `target` has become a clone of the open file `source`."""
    try:
        if sys.platform == "darwin":
            return _share_on_macos(source, target)
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
    except (ImportError, OSError):  # another file system, or another disk, or no room
        os.ftruncate(target, 0)
        return False
    return True


def _share_on_macos(source: int, target: int) -> bool:
    """`fclonefileat` makes a file of its own, which is swapped with the target by its name."""
    import ctypes
    import fcntl

    where = 50  # F_GETPATH
    path = fcntl.fcntl(target, where, b"\0" * 1024).rstrip(b"\0")
    cloned = path + b".clone"
    library = ctypes.CDLL(None, use_errno=True)
    here = -2  # AT_FDCWD
    if library.fclonefileat(source, here, cloned, 0) != 0:
        return False
    try:
        descriptor = os.open(cloned, os.O_RDWR)
        try:
            os.replace(cloned, path)
            os.dup2(descriptor, target, inheritable=False)
        finally:
            os.close(descriptor)
    except OSError:
        os.unlink(cloned)
        raise
    return True


def is_same(source: FileSource, target: int) -> bool:
    """Whether an open file has the size of a source, and its bytes at the places looked at."""
    size = source.size
    if os.fstat(target).st_size != size:
        return False
    last = max(size - _SAMPLE, 0)
    for offset in sorted({last * number // _SAMPLES for number in range(_SAMPLES + 1)}):
        length = min(_SAMPLE, size - offset)
        meant = read_exactly(source.fileno(), offset, length, source.name)
        if read_some(target, length, offset) != meant:
            return False
    return True

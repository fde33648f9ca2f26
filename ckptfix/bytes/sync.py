"""Making what was done to the names in a folder last: a rename or a new file is safe only then."""

from __future__ import annotations

import contextlib
import errno
import os

_CANNOT = {errno.EINVAL, errno.EACCES, errno.EBADF, errno.EOPNOTSUPP}
"""What systems and file systems say that cannot sync a folder."""


def sync_folder(folder: str) -> None:
    """Sync a folder, where the system can. Raises OSError where the disk refuses."""
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def try_to_sync_folder(folder: str) -> None:
    """As `sync_folder`, where a failure changes nothing: the file has its name already."""
    with contextlib.suppress(OSError):
        sync_folder(folder)

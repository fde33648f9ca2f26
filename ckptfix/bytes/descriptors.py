"""How many files may be open at once: a checkpoint in pieces may lie in thousands."""

from __future__ import annotations

from contextlib import suppress

_OTHERS = 256
"""Descriptors that whatever else is done may need."""


def allow(files: int) -> None:
    """Ask the system to let this process hold so many files open, as far as it may be asked.

    Only the limit that a process sets itself is raised, and never beyond the one that it is given.
    """
    try:
        import resource
    except ImportError:  # Windows, which counts differently
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + _OTHERS
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(ValueError, OSError):  # macOS has a limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

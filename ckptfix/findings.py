"""What ckptfix notices: one record, and the one table of codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a finding matters."""

    ERROR = "error"
    """The checkpoint does not load, or not rightly, until it is mended."""
    WARNING = "warning"
    """It loads somewhere, and fails or misleads elsewhere."""
    NOTE = "note"
    """Worth knowing; nothing is wrong."""


CODES: dict[str, tuple[Severity, str]] = {
    "prefix-wrapper": (Severity.ERROR, "every key begins with a name that a wrapper added"),
    "partial-prefix": (Severity.NOTE, "some keys begin with `module`, others do not"),
    "key-collision": (Severity.ERROR, "keys that would become one without their wrapper's name"),
    "wrapper-inside": (Severity.WARNING, "keys hold a wrapper's name further inside"),
    "swa-layout": (Severity.NOTE, "averaged weights: `module.*` beside `n_averaged`"),
    "device-tag": (Severity.ERROR, "storages are tagged with a device other than the CPU"),
    "blocked-globals": (
        Severity.WARNING,
        "`weights_only=True` refuses classes that the file names",
    ),
    "view-bloat": (Severity.WARNING, "storages are larger than the tensors that use them"),
    "tied-tensors": (Severity.NOTE, "several names for one tensor"),
    "no-checksums": (Severity.NOTE, "the archive was saved without checksums"),
    "rolled-back": (Severity.NOTE, "an edit in place had been interrupted, and was undone"),
    "trailing-bytes": (Severity.WARNING, "bytes follow the end of the checkpoint"),
    "unused-records": (Severity.WARNING, "storages in the archive that nothing refers to"),
    "surplus-shard": (Severity.WARNING, "files beside the shards that the index does not name"),
    "wrong-extension": (Severity.WARNING, "the name says another container than the bytes do"),
    "no-state-dict": (Severity.ERROR, "nothing in the file maps names to tensors"),
}
"""Severity and meaning of each code."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was noticed: what, where in the checkpoint, and the command that mends it."""

    code: str
    message: str
    where: str = "/"
    command: str | None = None

    @property
    def severity(self) -> Severity:
        """How much it matters; the table decides."""
        return CODES[self.code][0]

"""Sources of which parts are used: checked as a whole before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.copy import check_crc
from ckptfix.bytes.source import Source

if TYPE_CHECKING:
    from ckptfix.bytes.span import Span


class CheckedSource(Source):
    """The source of a span of which parts are used: at the first use the whole span is checked.

    A part has no CRC on record, so damage would pass unseen. Raises `DamagedError`.
    """

    is_checked = True
    """Whether all of its bytes have a checksum on record."""

    def __init__(self, span: Span, label: str) -> None:
        self.name, self.size = span.source.name, span.source.size
        self._span, self._label = span, label
        self._sound = False

    def check(self) -> None:
        """Raise `DamagedError` where the whole span does not have the checksum on record."""
        if not self._sound:
            check_crc(self._span, self._label)
            self._sound = True

    def fileno(self) -> int | None:
        """The descriptor of the source."""
        self.check()
        return self._span.source.fileno()

    @property
    def begin(self) -> int:
        """Where the bytes of the source begin in what `fileno` opens."""
        return self._span.source.begin

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the source from `offset`."""
        self.check()
        return self._span.source.read(offset, length)

"""A file being written, in blocks that each pass by the way that costs least.

Bytes that no checksum is wanted of are copied inside the kernel. Those that are to be summed have
to be read for that anyway: a worker reads and sums a block while this thread writes the one before,
which takes less time than to have the kernel copy and then to read. To write on several threads
gains nothing, since the system lets one at a time write to a file. Blocks that are computed, as by
a cast, are work for all cores; workers put them where they belong.
"""

from __future__ import annotations

import errno
import os
from _thread import allocate_lock
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from isal import isal_zlib

from ckptfix.bytes import clone
from ckptfix.bytes.engine import Sum, Workers, blocks, in_order, look, said, wrong_sum
from ckptfix.bytes.source import BLOCK, CHUNK, ReadAhead, Source, everything, read_into
from ckptfix.bytes.span import Span
from ckptfix.bytes.sums import joined
from ckptfix.errors import DamagedError, VerifyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from ckptfix.bytes.engine import Label, Progress
    from ckptfix.bytes.journal import Patch
    from ckptfix.bytes.source import FileSource

Checked = Literal["copied", "checked", "shared", "verified"]
"""What is known of the bytes that passed from an input to an output.

`checked`: each was held against a checksum on record. `copied`: so were those that have one; the
container keeps none of others. `verified`: checked as far as that, and the output was read back.
`shared`: the file system shares the blocks of the input, and nothing was read.
"""


_SMALL, _AHEAD = 1 << 12, 1 << 14
"""Spans so small are copied faster here than by the kernel, and read so many bytes at a time."""

_ALONE = 1 << 16
"""Bytes up to which handing a block to a worker takes longer than seeing to it here."""

_AHEAD_BLOCKS = 2
"""Blocks that are read before they can be written."""

_NO_KERNEL_COPY = {
    errno.ENOSYS,
    errno.EXDEV,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EPERM,
}


class Written(NamedTuple):
    """A stretch of the file, and the CRC-32 of what was handed to the system for it."""

    begin: int
    length: int
    label: Label
    crc: int | Sum


class _Read:
    """A block that a worker reads, and where it belongs."""

    def __init__(self, made: Future[tuple[int, memoryview]], position: int) -> None:
        self.position = position
        self._made: Future[tuple[int, memoryview]] | None = made
        self._crc = 0

    def data(self) -> memoryview:
        """Its bytes."""
        assert self._made is not None
        return self._made.result()[1]

    def done_with(self) -> None:
        """Let go of the bytes, whose buffer is used again."""
        self._crc, self._made = self.result(), None

    def done(self) -> bool:
        """Whether `result` has nothing to wait for."""
        return self._made is None or self._made.done()

    def result(self) -> int:
        """Its CRC-32."""
        return self._crc if self._made is None else self._made.result()[0]


class Sink:
    """A file being written in order. Everything that writers need, and nothing that reads.

    With `verify` it remembers the checksum of everything it writes, so that `verify` can read the
    file back and compare. Close it.
    """

    def __init__(
        self,
        descriptor: int,
        name: str,
        progress: Progress | None = None,
        *,
        verify: bool = False,
    ) -> None:
        self.descriptor = descriptor
        self.name = name
        self._progress = progress
        self._buffer = bytearray()
        self._flushed = 0
        self._reads: deque[_Read] = deque()
        self._buffers: list[bytearray] = []
        self._kernel_copy = hasattr(os, "copy_file_range")
        self._workers = Workers()
        self._ahead: ReadAhead | None = None
        self._sources: dict[int, Source] = {}
        self._checks: list[tuple[Label, Span, Sum]] = []
        self._written: list[Written] | None = [] if verify else None
        self._patches: list[Patch] = []
        self._result: Checked = "checked"

    @property
    def result(self) -> Checked:
        """What is known of the bytes, once `sync` and `verify` have returned."""
        return "verified" if self._written is not None else self._result

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._flushed + len(self._buffer)

    def close(self) -> None:
        """End the threads. The descriptor is its owner's."""
        self._workers.close()

    # --- bytes made here

    def write(self, data: bytes) -> None:
        """Write bytes at the end."""
        if len(data) >= CHUNK:
            self._write_now(data)
            return
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            self.flush()

    def patch(self, patch: Patch) -> None:
        """Write bytes over earlier ones."""
        self.flush()
        self._patches.append(patch)
        _write_all(self.descriptor, patch.new, patch.offset)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._buffer:
            data, self._buffer = self._buffer, bytearray()
            self._write_now(data)

    def _write_now(self, data: bytes | bytearray) -> None:
        self.flush()
        if self._written is not None:
            crc = isal_zlib.crc32(data)
            self._written.append(Written(self._flushed, len(data), "its names", crc))
        _write_all(self.descriptor, data, self._flushed)
        self._flushed += len(data)

    # --- bytes of sources

    def copy(self, part: Span | bytes, label: Label = "a record") -> None:
        """Copy a span to the end; inside the kernel where it lies in a file.

        Where it has a CRC on record, its bytes are held against that beside the copying, and `sync`
        tells, by raising. `label` is what messages call it.
        """
        if isinstance(part, bytes):
            self.write(part)
            return
        if part.crc is None:
            self._pass(part, label, None)
            return
        if part.length <= _SMALL and part.source.fileno() is not None:
            if isal_zlib.crc32(self._small(part)) != part.crc:
                raise wrong_sum(part, label)
            return
        total = Sum(self._workers)
        self._pass(part, label, total)
        self._checks.append((label, part, total))

    def copy_summed(self, parts: Sequence[Span | bytes], label: Label = "a record") -> Sum:
        """Copy spans to the end; the CRC-32 of all their bytes is computed beside that."""
        total = Sum(self._workers)
        for part in parts:
            if isinstance(part, bytes):
                self.write(part)
                total.add_data(part)
            elif part.crc is None:
                self._pass(part, label, total)
            else:
                self.copy(part, label)
                total.add_summed(part.crc, part.length)  # if it is another, `sync` raises
        return total

    def check(self, span: Span, label: Label) -> None:
        """Hold a span against its CRC although only parts of it are copied; `sync` tells."""
        if span.crc is not None:
            total = Sum(self._workers)
            total.add(span)
            self._checks.append((label, span, total))

    def _pass(self, span: Span, label: Label, total: Sum | None) -> None:
        if not span.length:
            return
        source = span.source
        self._note(source)
        if span.crc is None and not source.is_checked:
            self._result = "copied"
        descriptor = source.fileno()
        if descriptor is not None and span.length <= _SMALL:
            data = self._small(span)
            if total is not None:
                total.add_data(data)
            return
        self.flush()
        summed = total is not None or self._written is not None
        crc = Sum(self._workers) if summed else None
        if self._written is not None and crc is not None:
            self._written.append(Written(self._flushed, span.length, label, crc))
        for block in blocks((span,)):
            self._pass_block(block, descriptor, crc)
        if total is not None and crc is not None:
            total.add_later(crc, span.length)

    def _pass_block(self, block: Span, descriptor: int | None, crc: Sum | None) -> None:
        """Copy one block, by the way that costs least."""
        if descriptor is not None and crc is None:
            done = self._copied_in_kernel(descriptor, block, self._flushed)
            if done < block.length:
                _write_all(self.descriptor, look(block)[done:], self._flushed + done)
            self._advance(block.length)
        elif block.length <= _ALONE:
            data = look(block)
            _write_all(self.descriptor, data, self._flushed)
            self._advance(block.length)
            if crc is not None:
                crc.add_data(data)
        elif descriptor is None:
            made = self._workers.submit(
                partial(self._computed, self._flushed), block, self._progress
            )
            if crc is not None:
                crc.add_later(made, block.length)
        else:
            assert crc is not None
            read = _Read(self._workers.submit(self._read, block), self._flushed)
            crc.add_later(read, block.length)
            self._reads.append(read)
            while len(self._reads) > _AHEAD_BLOCKS:
                self._write_read()
        self._flushed += block.length

    def _computed(self, position: int, block: Span) -> int:
        """Compute a block and put it where it belongs; its CRC."""
        data = look(block)
        _write_all(self.descriptor, data, position)
        return isal_zlib.crc32(data)

    def _read(self, block: Span) -> tuple[int, memoryview]:
        """A block of a file and its CRC."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray(BLOCK)
        data = memoryview(buffer)[: block.length]
        block.source.readinto(block.offset, data)
        return isal_zlib.crc32(data), data

    def _write_read(self) -> None:
        """Put the first block that was read ahead where it belongs."""
        read = self._reads.popleft()
        data = read.data()
        _write_all(self.descriptor, data, read.position)
        self._advance(len(data))
        read.done_with()
        buffer = data.obj
        assert isinstance(buffer, bytearray)
        self._buffers.append(buffer)

    def _copied_in_kernel(self, descriptor: int, block: Span, position: int) -> int:
        """Bytes copied: to the end of the block, or until the system says that it cannot."""
        start, done = block.source.begin + block.offset, 0
        while self._kernel_copy and done < block.length:
            rest = block.length - done
            try:
                copied = os.copy_file_range(
                    descriptor, self.descriptor, rest, start + done, position + done
                )
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                self._kernel_copy = False
                break
            if not copied:
                raise DamagedError("became shorter while it was read", where=block.source.name)
            done += copied
        return done

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count)

    def _small(self, span: Span) -> bytes:
        """Copy a few bytes of a file, and give them."""
        source = span.source
        if self._ahead is None or self._ahead.source is not source:
            self._note(source)
            self._ahead = ReadAhead(source, _AHEAD)
        data = self._ahead.read(span.offset, span.length)
        self.write(data)
        self._advance(span.length)
        return data

    def _note(self, source: Source) -> None:
        """Keep a source and all below it, to be asked at the end whether all was right."""
        if id(source) not in self._sources:
            self._sources.update((id(one), one) for one in everything(source))

    # --- a whole file

    def clone(self, source: FileSource) -> bool:
        """Become a file that shares the blocks of another one, where the file system can.

        Nothing may have been written before. False: it cannot, and nothing has changed. Raises
        `VerifyError` where the file system says that it did, and did not.
        """
        if not clone.share(source.fileno(), self.descriptor):
            return False
        self._note(source)
        if not clone.is_same(source, self.descriptor):
            raise VerifyError(
                "does not hold the bytes of the input, though the file system said that it shares"
                " them",
                where=self.name,
                hint="write to another file system",
            )
        self._flushed = source.size
        self._result = "shared"
        return True

    def restart(self) -> None:
        """Forget what was written."""
        os.ftruncate(self.descriptor, 0)
        self._flushed = 0
        self._patches.clear()
        self._result = "checked"

    # --- the end

    def sync(self) -> None:
        """Return once everything written is on the disk and everything checked is right."""
        self.flush()
        while self._reads:
            self._write_read()
        self._workers.drain()
        for label, span, total in self._checks:
            if total.value() != span.crc:
                raise wrong_sum(span, label)
        for source in self._sources.values():
            source.check()
        os.fsync(self.descriptor)

    def verify(self) -> None:
        """Read the file back, from the disk where the system can, and compare with what was meant.

        Call it after `sync`. Raises `VerifyError`.
        """
        if self._written is None:
            return
        forget = getattr(os, "posix_fadvise", None)
        if forget is not None:
            forget(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        source = _Written(self.descriptor, self._flushed, self.name)
        stretches = [Span(source, row.begin, row.length) for row in self._written]
        made = in_order(self._read_back, blocks(stretches), self._progress)
        for row, stretch in zip(self._written, stretches, strict=True):
            crc = 0
            for block in blocks((stretch,)):
                crc = joined(crc, next(made), block.length)
            meant = row.crc if isinstance(row.crc, int) else row.crc.value()
            if crc != meant:
                what = f"reads back other bytes than were written ({said(row.label)})"
                raise VerifyError(what, where=self.name, hint="the disk may be failing")

    def _read_back(self, block: Span) -> int:
        """The CRC of a block as it was before it was patched; of another, if a patch is missing."""
        data, end = look(block), block.offset + block.length
        for offset, old, new in self._patches:
            if offset < end and offset + len(new) > block.offset:
                first, last = max(offset, block.offset), min(offset + len(new), end)
                part = slice(first - block.offset, last - block.offset)
                cut = slice(first - offset, last - offset)
                if data[part] != new[cut]:
                    return isal_zlib.crc32(data) ^ 1
                data[part] = old[cut]
        return isal_zlib.crc32(data)


class _Written(Source):
    """What a sink has written."""

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self._descriptor, self.size, self.name = descriptor, size, name

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.readinto(offset, memoryview(data))
        return bytes(data)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        read_into(self._descriptor, offset, buffer, self.name)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = _write_some(descriptor, view, position)
        view, position = view[written:], position + written


def _write_some(descriptor: int, data: memoryview, position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, position)
    with _POSITIONING:
        os.lseek(descriptor, position, os.SEEK_SET)
        return os.write(descriptor, data)


_POSITIONING = allocate_lock()

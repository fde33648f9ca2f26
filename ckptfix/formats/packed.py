"""Checkpoints that someone packed: gzip around any of them, and tar archives that hold one."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

from ckptfix.bytes.source import CHUNK, Source
from ckptfix.bytes.span import Span
from ckptfix.bytes.unpacked import UnpackedSource, inflate
from ckptfix.errors import NotACheckpointError, UnsafeError
from ckptfix.formats import torch_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ckptfix.limits import Limits

GZIP = b"\x1f\x8b"
_FREE, _RATIO = 16 << 20, 200
"""What may be unpacked without question, and how many times its size a file may unpack to then."""


def unzipped(source: Source) -> UnpackedSource:
    """What a gzip file holds, in an unnamed file. Raises `UnsafeError` for a bomb, or for gzip."""
    cap = max(_FREE, _RATIO * source.size)
    packed = Span(source, 0, source.size)
    size = sum(len(chunk) for chunk in _capped(packed, cap))
    found = UnpackedSource(lambda: inflate(packed, 31), size, source.name)
    if found.head(len(GZIP)) == GZIP:  # a few bytes could ask for any amount
        raise UnsafeError(
            f"{source.name}: gzip inside gzip", hint="unpack it yourself if you trust it: gunzip"
        )
    return found


def salvaged(source: Source) -> UnpackedSource:
    """What a gzip file that is cut short or damaged holds up to there."""
    packed, cap = Span(source, 0, source.size), max(_FREE, _RATIO * source.size)

    def chunks() -> Iterator[bytes]:
        engine, made = zlib.decompressobj(31), 0
        pieces = (
            part[i : i + _PIECE] for part in packed.chunks() for i in range(0, len(part), _PIECE)
        )
        with suppress(zlib.error):
            for piece in pieces:
                chunk = engine.decompress(piece)
                made += len(chunk)
                if made > cap:
                    return
                yield chunk

    return UnpackedSource(chunks, sum(map(len, chunks())), source.name)


_PIECE = 256
"""Packed bytes that are looked at together: what comes before damage among them is lost with it."""


def capped(limits: Limits, source: Source) -> Limits:
    """Limits for what lies in a gzip file: a pickle in it may be packed twice over."""
    return limits._replace(pickle_bytes=min(limits.pickle_bytes, _RATIO * source.size))


def _capped(packed: Span, cap: int) -> Iterator[bytes]:
    made = 0
    for chunk in inflate(packed, 31):
        made += len(chunk)
        if made > cap:
            raise UnsafeError(
                f"{packed.source.name}: {packed.length} bytes of gzip unpack to more than {cap}",
                hint="unpack it yourself if you trust it: gunzip -k FILE",
            )
        yield chunk


def first_member(
    members: Mapping[str, Span], is_checkpoint: Callable[[bytes], bool]
) -> UnpackedSource | None:
    """The first checkpoint among the files of a tar archive, in an unnamed file."""
    found = _checkpoints(members, is_checkpoint)
    return next((_member(name, span) for name, span in found.items()), None)


def only_member(source: Source, is_checkpoint: Callable[[bytes], bool]) -> Source:
    """The one checkpoint in a tar archive, in an unnamed file. Raises `NotACheckpointError`."""
    found = _checkpoints(torch_tar.members(source), is_checkpoint)
    if len(found) != 1:
        listed = ", ".join(found) or "none of them a checkpoint"
        raise NotACheckpointError(
            f"{source.name}: a tar archive of several files ({listed})",
            hint=f"unpack it, and give one of them: tar xf {source.name}",
        )
    ((name, span),) = found.items()
    return _member(name, span)


def _checkpoints(
    members: Mapping[str, Span], is_checkpoint: Callable[[bytes], bool]
) -> dict[str, Span]:
    heads = {name: span.slice(0, min(span.length, 4096)) for name, span in members.items()}
    return {name: members[name] for name, head in heads.items() if is_checkpoint(head.read())}


def _member(name: str, span: Span) -> UnpackedSource:
    return UnpackedSource(lambda: span.chunks(CHUNK), span.length, f"{span.source.name}:{name}")

"""gzip around a checkpoint: what it holds is unpacked into an unnamed file. Source: RFC 1952."""

from __future__ import annotations

import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

from ckptfix.bytes.span import Span
from ckptfix.bytes.unpacked import UnpackedSource, inflate
from ckptfix.errors import DamagedError, UnsafeError
from ckptfix.formats.not_checkpoints import unpacking
from ckptfix.formats.reading import Reading, Salvage
from ckptfix.hints import Hint
from ckptfix.limits import unpacked_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ckptfix.bytes.source import Source

NAME = "gzip"
_MAGIC = b"\x1f\x8b"


def recognises(source: Source) -> bool:
    """Whether a file is packed with gzip."""
    return source.head(len(_MAGIC)) == _MAGIC


def unpack(source: Source, reading: Reading) -> Source:
    """What a gzip file holds. Raises `UnsafeError` for a bomb, or for gzip; `DamagedError`."""
    reading.narrow(source.size)  # a pickle in it may be packed twice over
    found = _salvaged(source, reading) if isinstance(reading, Salvage) else _unzipped(source)
    if recognises(found):  # a few bytes could ask for any amount
        raise UnsafeError(
            "is packed twice: gzip inside gzip", where=source.name, hint=_yourself(source)
        )
    return found


def _unzipped(source: Source) -> UnpackedSource:
    packed = Span(source, 0, source.size)
    size = sum(len(chunk) for chunk in _capped(packed))
    return UnpackedSource(lambda: inflate(packed, 31), size, source.name, (source,))


def _capped(packed: Span) -> Iterator[bytes]:
    made, cap = 0, unpacked_bytes(packed.source.size)
    for chunk in inflate(packed, 31):
        made += len(chunk)
        if made > cap:
            raise UnsafeError(
                f"{packed.length} bytes of gzip unpack to more than {cap}",
                where=packed.source.name,
                hint=_yourself(packed.source),
            )
        yield chunk


def _yourself(source: Source) -> Hint:
    return Hint("unpack it yourself if you trust it", unpacking(NAME, source.name))


def _salvaged(source: Source, found: Salvage) -> UnpackedSource:
    """What a gzip file that may be cut short or damaged holds up to there."""
    try:
        whole = _unzipped(source)
        found.steps.append(f"unpacked {whole.size} bytes of gzip")
    except DamagedError as error:
        whole = _up_to_the_damage(source)
        found.steps.append(f"unpacked {whole.size} bytes of gzip, and {error}")
    return whole


def _up_to_the_damage(source: Source) -> UnpackedSource:
    packed, cap = Span(source, 0, source.size), unpacked_bytes(source.size)

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

    return UnpackedSource(chunks, sum(map(len, chunks())), source.name, (source,))


_PIECE = 256
"""Packed bytes that are looked at together: what comes before damage among them is lost with it."""

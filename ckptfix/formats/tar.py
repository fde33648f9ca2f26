"""A tar archive with one checkpoint in it, which someone packed. torch's own are in `torch_tar`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.source import CHUNK, BytesSource, Source
from ckptfix.bytes.unpacked import UnpackedSource
from ckptfix.errors import NotACheckpointError
from ckptfix.formats import safetensors, torch_legacy, torch_tar, torch_zip
from ckptfix.hints import Hint, shell
from ckptfix.words import listed

if TYPE_CHECKING:
    from ckptfix.bytes.span import Span
    from ckptfix.formats.reading import Reading

NAME = "tar"
_HEAD = 4096


def recognises(source: Source) -> bool:
    """Whether a file is a tar archive."""
    return torch_tar.is_archive(source)


def unpack(source: Source, reading: Reading) -> Source:
    """The one checkpoint in a tar archive; of a damaged archive, the first that is there.

    Raises `NotACheckpointError` where there is none, or more than one.
    """
    members = torch_tar.members_there(source) if reading.salvages else torch_tar.members(source)
    found = {name: span for name, span in members.items() if _is_checkpoint(span)}
    if not found or (len(found) > 1 and not reading.salvages):
        names = listed(found) or "none of them a checkpoint"
        raise NotACheckpointError(
            f"is a tar archive of several files ({names})",
            where=source.name,
            hint=Hint("unpack it, and give one of them", shell("tar", "xf", files=[source.name])),
        )
    name, span = next(iter(found.items()))
    label = f"{source.name}:{name}"
    return UnpackedSource(lambda: span.chunks(CHUNK), span.length, label, (source,))


def _is_checkpoint(span: Span) -> bool:
    """Whether a member begins as a container of torch's or safetensors does."""
    head = BytesSource(span.slice(0, min(span.length, _HEAD)).read())
    if any(one.recognises(head) for one in (torch_zip, torch_legacy, safetensors)):
        return True
    return torch_tar.is_archive(head)

"""Which container a file is that is no zip: told by its first bytes, as far as it goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.errors import DamagedError
from ckptfix.formats import (
    not_checkpoints,
    packed,
    plain_pickle,
    safetensors,
    torch_legacy,
    torch_tar,
    torch_zip,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptfix.bytes.source import Source
    from ckptfix.limits import Limits
    from ckptfix.tree.document import Document

    Read = Callable[[Source, Limits], Document]


def read(source: Source, limits: Limits, read_inside: Read) -> Document:
    """The document in a file that is no zip. What is packed in it goes to `read_inside`.

    Raises `ReadError` and its kin: not a checkpoint, damaged, unsafe or unsupported.
    """
    head = source.head()
    if head.startswith(packed.GZIP):
        return read_inside(packed.unzipped(source), packed.capped(limits, source))
    if torch_tar.matches(head):
        return _read_tar(source, limits, read_inside)
    if torch_legacy.matches(head):
        return torch_legacy.read(source, limits)
    if safetensors.matches(head):
        return safetensors.read(source, limits)
    if not plain_pickle.matches(source, head):
        raise not_checkpoints.explain(source, head)
    try:
        return plain_pickle.read(source, limits)
    except DamagedError:
        if head[:1] == b"\x80":
            raise
        raise not_checkpoints.explain(source, head) from None


def is_checkpoint(head: bytes) -> bool:
    """Whether a file begins as one of torch's containers or safetensors does."""
    containers = (torch_zip, torch_tar, torch_legacy, safetensors)
    return any(container.matches(head) for container in containers)


def _read_tar(source: Source, limits: Limits, read_inside: Read) -> Document:
    if torch_tar.is_checkpoint(torch_tar.members(source)):
        return torch_tar.read(source, limits)
    member = packed.only_member(source, is_checkpoint)
    if torch_tar.matches(member.head()):
        return torch_tar.read(member, limits)  # and no other: archives could nest without end
    return read_inside(member, limits)

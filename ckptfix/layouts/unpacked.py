"""A torch zip that someone unpacked: each file of a folder is a record, opened when wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.span import Span
from ckptfix.errors import DamagedError, ReadError
from ckptfix.findings import Finding
from ckptfix.formats.torch_zip import from_records
from ckptfix.hints import Hint, command
from ckptfix.words import listed

if TYPE_CHECKING:
    from ckptfix.bytes.place import Place
    from ckptfix.formats.reading import Reading
    from ckptfix.tree.document import Document

_PICKLE = "data.pkl"
_REFUSED = "it is an archive that was unpacked: torch.load takes the archive, not the folder"


def of_folder(folder: Place, reading: Reading) -> Document | None:
    """The document in a folder that holds the records of an archive; None for other folders."""
    inside = [name for name in folder.names() if folder.below(name).below(_PICKLE).is_file]
    whole = folder if folder.below(_PICKLE).is_file else None
    if whole is None:
        if len(inside) != 1:
            _check_pickle(folder, inside)
            return None
        whole = folder.below(inside[0])
    sources = {name: whole.below(name).open() for name in sorted(whole.files())}
    records = {name: Span(source, 0, source.size) for name, source in sources.items()}
    size = sum(span.length for span in records.values())
    notes = (Finding("container-refused", _REFUSED),)
    return from_records(records, folder.name, size, reading, notes)


def _check_pickle(folder: Place, inside: list[str]) -> None:
    """Refuse by name a folder of several unpacked archives, and one that lacks its pickle."""
    if inside:
        raise ReadError(
            f"holds {len(inside)} archives that were unpacked: {listed(inside)}",
            where=folder,
            hint=Hint("give one of them", command("inspect", folder.below(inside[0]).name)),
            code="several-checkpoints",
        )
    for place in (folder, *map(folder.below, folder.names())):
        if place.below("data").is_folder and place.below("version").is_file:
            raise DamagedError(
                f"is an archive that was unpacked, and lacks {_PICKLE}, which names its tensors",
                where=place,
                hint="unpack it again, or copy that file too",
                code="no-pickle",
            )

"""A torch zip that someone unpacked: each file of a folder is a record, opened when wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.bytes.span import Span
from ckptfix.findings import Finding
from ckptfix.formats.torch_zip import from_records

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
            return None
        whole = folder.below(inside[0])
    sources = {name: whole.below(name).open() for name in sorted(whole.files())}
    records = {name: Span(source, 0, source.size) for name, source in sources.items()}
    size = sum(span.length for span in records.values())
    notes = (Finding("container-refused", _REFUSED),)
    return from_records(records, folder.name, size, reading, notes)

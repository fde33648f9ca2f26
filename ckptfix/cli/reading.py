"""Reading for a command: what was done to a file before it could be read is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix import door
from ckptfix.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ckptfix.findings import Finding
    from ckptfix.tree.document import Document


def read(path: str) -> Document:
    """As `door.read`, and a note where an interrupted edit was undone."""
    document = door.read(path)
    say_notes(document.notes)
    return document


def say_notes(notes: Iterable[Finding]) -> None:
    """Say that an interrupted edit was undone, where one was."""
    for note in notes:
        if note.code == "rolled-back":
            output.note(note.message)

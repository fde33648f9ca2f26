"""What every command that writes a file does alike: refuse early, fit, write, say what was done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptfix import edits, formats
from ckptfix.cli import output
from ckptfix.errors import WriteError
from ckptfix.files import check_output
from ckptfix.trees import storages

if TYPE_CHECKING:
    from ckptfix.document import Document

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Job:
    """One file to be made of another."""

    command: str
    source: str
    target: str
    force: bool
    dry_run: bool

    def open(self) -> Document:
        """Read the input, once it is sure that the output could be written."""
        formats.writable(self.target)
        if _same_file(self.source, self.target):
            raise WriteError(
                f"{self.target}: is the input itself",
                hint="give another name for the output",
                code="same-file",
            )
        check_output(self.target, force=self.force)
        return formats.read(self.source)

    def nothing(self, why: str) -> int:
        """Say that there was nothing to do; returns the exit code for it."""
        data = {"command": self.command, "input": self.source, "output": None, "done": why}
        output.answer(data, f"{self.source}: {why}; nothing written")
        return 1

    def write(
        self, document: Document, done: str, data: dict[str, Any], select: str | None = None
    ) -> int:
        """Write a document to the output and say so; returns the exit code.

        `done` says what was changed, `data` the same for JSON.
        """
        fitted = edits.fit(document, self.target, select)
        found = storages(fitted.document.root)
        total = sum(storage.nbytes for storage in found)
        if not self.dry_run:
            with output.progress(f"writing {self.target}", total) as advance:
                formats.write(fitted.document, self.target, force=self.force, progress=advance)
        self._say_left_out(fitted.left_out)
        verb = "would write" if self.dry_run else "wrote"
        left_out = [{"path": path, "kind": kind} for path, kind in fitted.left_out]
        answer = {
            "command": self.command,
            "input": self.source,
            "output": self.target,
            "dry_run": self.dry_run,
            "done": done,
            "left_out": left_out,
            **data,
        }
        output.answer(answer, f"{verb} {self.target}: {done}")
        return 0

    def _say_left_out(self, left_out: list[tuple[str, str]]) -> None:
        if not left_out:
            return
        shown = ", ".join(f"{path} ({kind})" for path, kind in left_out[:_SHOWN])
        more = f", and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        output.note(f"{output.plural(len(left_out), 'thing')} left out of it: {shown}{more}")


def _same_file(source: str, target: str) -> bool:
    return os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target)

"""What every command that writes a file does alike: refuse early, fit, write, say what was done."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptfix import door
from ckptfix.cli import output, reading
from ckptfix.edit import reduce
from ckptfix.errors import InPlaceError, RenameError, WriteError
from ckptfix.formats.table import EXTENSIONS
from ckptfix.tree.walk import nbytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ckptfix.tree.document import Document

_SHOWN = 10


class Job(NamedTuple):
    """One file to be made of another."""

    command: str
    source: str
    target: str
    force: bool
    dry_run: bool
    max_shard_size: int | None = None
    in_place: bool = False
    """The source itself is changed, and is the target."""

    def open(self) -> Document:
        """Read the input, once it is sure that the output could be written."""
        if not self.in_place:
            self.check()
        return reading.read(self.source)

    def check(self) -> None:
        """Refuse early what could not be written later. Raises `WriteError`."""
        output_ = door.resolve(self.target)
        if _same_file(self.source, self.target):
            raise WriteError(
                f"{self.target}: is the input itself",
                hint="give another name for the output",
                code="same-file",
            )
        output_.check(force=self.force)

    def nothing(self, why: str) -> int:
        """Say that there was nothing to do; returns the exit code for it."""
        data = {
            "command": self.command,
            "input": self.source,
            "output": None,
            "dry_run": self.dry_run,
            "done": why,
        }
        output.answer(data, f"{self.source}: {why}; nothing written")
        return 1

    @contextmanager
    def naming_the_input(self) -> Iterator[None]:
        """Have errors about keys begin with the name of the file, as all others do."""
        try:
            yield
        except RenameError as error:
            raise error.within(self.source) from None

    def write(
        self,
        document: Document,
        done: str,
        data: dict[str, Any],
        select: str | None = None,
        *,
        left_out: Sequence[tuple[str, str]] = (),
        after: Callable[[], dict[str, Any]] = dict,
    ) -> int:
        """Write a document to the output and say so; returns the exit code.

        `done` says what was changed, `data` the same for JSON. `left_out` has path and kind of what
        was left out before; `after` is called once everything is written, and adds to `data`.
        """
        if self.in_place:
            return self._edit(document, done, {**data, **after()})
        fitted = reduce.fit(document, self.target, select)
        fitted.left_out[:0] = left_out
        if not self.dry_run:
            label, root = f"writing {self.target}", fitted.document.root
            with output.progress(label, lambda: nbytes(root)) as advance:
                door.write(
                    fitted.document,
                    self.target,
                    force=self.force,
                    progress=advance,
                    max_shard_size=self.max_shard_size,
                )
        self._say_left_out(fitted.left_out)
        data = {**data, **after()}
        verb = "would write" if self.dry_run else "wrote"
        rows = [{"path": path, "kind": kind} for path, kind in fitted.left_out]
        answer = {
            "command": self.command,
            "input": self.source,
            "output": self.target,
            "in_place": False,
            "dry_run": self.dry_run,
            "done": done,
            "left_out": rows,
            **data,
        }
        output.answer(answer, f"{verb} {self.target}: {done}")
        return 0

    def _edit(self, document: Document, done: str, data: dict[str, Any]) -> int:
        """Change the input itself and say so; returns the exit code."""
        from ckptfix.edit import inplace

        try:
            edit = inplace.prepare(document)
            if not self.dry_run:
                inplace.apply(edit)
        except InPlaceError as error:
            raise error.suggest(f"write a copy: {self._copy()}") from None
        verb = "would change" if self.dry_run else "changed"
        answer = {
            "command": self.command,
            "input": self.source,
            "output": self.target,
            "in_place": True,
            "dry_run": self.dry_run,
            "done": done,
            "left_out": [],
            **data,
        }
        size = output.size(edit.nbytes)
        output.answer(answer, f"{verb} {self.target} in place: {done}; {size} of it rewritten")
        return 0

    def _copy(self) -> str:
        """The command that was given, with an output instead of `--in-place`."""
        stem, extension = os.path.splitext(self.source)
        known = extension.lower() in EXTENSIONS
        target = f"{stem}.fixed{extension if known else '.pt'}"
        given = (argument for argument in sys.argv[1:] if argument != "--in-place")
        return shlex.join(["ckptfix", *given, target])

    def _say_left_out(self, left_out: list[tuple[str, str]]) -> None:
        if not left_out:
            return
        shown = ", ".join(f"{path} ({kind})" for path, kind in left_out[:_SHOWN])
        more = f", and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        output.note(f"{output.plural(len(left_out), 'thing')} left out of it: {shown}{more}")


def _same_file(source: str, target: str) -> bool:
    return os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target)

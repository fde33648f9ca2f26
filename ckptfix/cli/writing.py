"""What every command that writes does alike: a job is opened, its document edited, and finished."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ckptfix import door
from ckptfix.bytes.place import Place, unused
from ckptfix.cli import options, output, paths, reading, rows
from ckptfix.cli.usage import Misuse
from ckptfix.contents.state_dicts import choose, choose_all
from ckptfix.door import Around
from ckptfix.edit import counting, reduce
from ckptfix.edit.reduce import Fitted
from ckptfix.errors import InPlaceError, RenameError, SelectionError, WriteError
from ckptfix.formats.table import EXTENSIONS, split_extension
from ckptfix.hints import Command, Hint, command
from ckptfix.pickles.dangerous import dangers, name_of
from ckptfix.tree.walk import nbytes
from ckptfix.words import listed, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ckptfix.bytes.copy import Checked
    from ckptfix.contents.state_dicts import StateDict
    from ckptfix.door import Output
    from ckptfix.edit.counting import Held
    from ckptfix.formats.table import Writable
    from ckptfix.keys.renaming import Renaming
    from ckptfix.tree.document import Document

_Function = TypeVar("_Function", bound="Callable[..., Any]")


_SLICE = "one of {} files of tensor parallelism: OUT has its slices; fix --model joins them"


class Job:
    """One output to be made of one source: from the options of a command to its exit code.

    A command opens it, edits the document, and finishes with what became of that, or with nothing.
    `output` is None where the source itself is changed.
    """

    def __init__(
        self,
        verb: str,
        source: str,
        output: Output | None,
        *,
        force: bool = False,
        dry_run: bool = False,
        max_shard_size: int | None = None,
        verify: bool = False,
    ) -> None:
        self.verb = verb
        self.source = source
        self.output = output
        self.force = force
        self.dry_run = dry_run
        self.max_shard_size = max_shard_size
        self.verify = verify
        self._around = Around([], [], [])

    @property
    def container(self) -> Writable:
        """The container that is written, where the source itself is not changed."""
        assert self.output is not None
        return self.output.container

    # --- open

    def check(self) -> None:
        """Refuse early what could not be written later. Raises `WriteError`."""
        if self.output is None:
            return
        if Place(self.source).is_same(Place(self.output.path)):
            raise WriteError(
                "is the input itself",
                where=self.output.path,
                hint="give another name for the output",
                code="same-file",
            )
        self.output.check(force=self.force)

    def open(self) -> Document:
        """Read the source, once it is sure that the output could be written."""
        self.check()
        document = reading.read(self.source)
        for note in document.notes:
            if note.code == "end-unproven":
                output.note(f"{self.source}: {note.message}")
        return self.given(document)

    def given(self, document: Document) -> Document:
        """Keep what lies around the source, for what is said in the end; returns the document."""
        if self.output is not None:
            self._around = self.output.around(document, self.source)
        return document

    @property
    def files_left(self) -> int:
        """How many files around the source stay where they are."""
        return len(self._around.left_out)

    @property
    def holds_one(self) -> bool:
        """Whether the output holds one state dict and nothing else."""
        return self.output is not None and self.container.tensors_only

    def states(self, document: Document, select: Sequence[str] = ()) -> list[StateDict]:
        """The state dicts to edit: those that are selected, or all that the output holds.

        Raises `SelectionError`.
        """
        if not self.holds_one:
            return choose_all(document, select)
        if len(select) > 1:
            raise SelectionError(
                f"several are selected ({listed(select)}), and {self.container.name} holds one",
                where=document.name,
                hint="give one --select, or OUT the extension .pt",
                code="ambiguous-state-dict",
            )
        return [choose(document, next(iter(select), None))]

    def reduced(self, document: Document, select: str | None = None) -> Fitted:
        """The document without what the output has no room for beside a state dict."""
        if not self.holds_one:
            return Fitted(document, [])
        return reduce.only(document, choose(document, select))

    @contextmanager
    def naming_the_source(self) -> Iterator[None]:
        """Have errors about keys say the name of the file, as all others do."""
        try:
            yield
        except RenameError as error:
            raise error.within(self.source) from None

    # --- finish

    def nothing(self, why: str, **more: Any) -> int:
        """Say that there was nothing to do; returns the exit code for it."""
        data = {"in_place": self.output is None, "dry_run": self.dry_run, "done": why, **more}
        told = f"{self.source}: {why}; nothing written"
        return output.answer(data, told, input=self.source, exit_code=1)

    def finish(
        self,
        document: Document,
        done: str | Callable[[Held], str],
        data: dict[str, Any],
        select: str | None = None,
        *,
        left_out: Sequence[tuple[str, str]] = (),
        after: Callable[[], dict[str, Any]] = dict,
        exit_code: int = 0,
        count: str | None = None,
    ) -> int:
        """Make the output of a document and say so; returns the exit code.

        `done` says what was changed, perhaps of what is counted in what is written, and `data` the
        same for JSON, where `count` names the number of tensors. `left_out` has path and kind of
        what was left out before; `after` is called once all is written, and adds to `data`.
        """
        if self.output is None:
            assert isinstance(done, str)
            self._say_dangers(document)
            return self._edit(document, done, {**data, **after()}, exit_code)
        fitted = reduce.fit(document, self.output.container, select)
        if self.verb == "recover":
            reduce.check_one(fitted.document)
        else:
            reduce.check_joined(fitted.document)
        if fitted.document.slices:
            output.note(f"{self.source}: {_SLICE.format(len(fitted.document.slices))}")
        self._say_dangers(fitted.document)
        left = [*left_out, *fitted.left_out, *self._around.left_out]
        asked = not isinstance(done, str) or count is not None or self.container.tensors_only
        held = counting.held(fitted.document, self.container) if asked else counting.NOBODY_ASKED
        if not isinstance(done, str):
            done = done(held)
        if count is not None:
            data = {**data, count: held.tensors}
        known = self._write(self.output, fitted.document)
        if held.written_once:
            keys = [f"{key} (as {other})" for key, other in held.written_once.items()]
            output.note_names(f"{plural(len(keys), 'tied key')} written once", keys)
        if left:
            names = [f"{path} ({kind})" for path, kind in left]
            output.note_names(f"{plural(len(left), 'thing')} left out of it", names)
        around = self._say_around()
        verb = "would write" if self.dry_run else "wrote"
        told = f"{verb} {self.output.path}: {done}{_SAID.get(known, '')}"
        once = {"written_once": dict(held.written_once)}
        data = {"container": document.container, "bytes": known, **once, **around, **data}
        return self._answer(told, done, {**data, **after()}, left, exit_code)

    def _say_around(self) -> dict[str, list[str]]:
        """Name the files that go into a folder, and out of it; returns the same for JSON."""
        carried, removed = [one.base for one in self._around.carried], self._around.removed
        would = "would be " if self.dry_run else ""
        if carried:
            output.note_names(f"{plural(len(carried), 'file')} {would}carried along", carried)
        if removed:
            what = f"{plural(len(removed), 'file')} of the checkpoint that was there"
            output.note_names(f"{what} {would}replaced or removed", removed)
        return {"carried": carried, "removed": removed}

    def finish_renamed(
        self, document: Document, changes: list[tuple[StateDict, Renaming]], label: str = ""
    ) -> int:
        """Make the output of a document with renamed keys, and say which were renamed.

        `changes` are those of `states`. `label` says it for people; without one the prefixes are
        named.
        """
        keys = [
            {
                old: new
                for old, new in renaming.changes.items()
                if not self.holds_one or old in state.tensors  # the others are left out
            }
            for state, renaming in changes
        ]
        total = sum(map(len, keys))
        labels = label or ", ".join(dict.fromkeys(renaming.label for _, renaming in changes))
        where = ", ".join(state.path for state, _ in changes if state.selection)
        done = f"{plural(total, 'key')} renamed ({labels})" + (f" in {where}" if where else "")
        found = [
            (state.path, renaming, renamed)
            for (state, renaming), renamed in zip(changes, keys, strict=True)
        ]
        self.list_renamed([(path, renamed) for path, _, renamed in found])
        select = changes[0][0].path if self.holds_one else None
        return self.finish(
            document, done, {"renamed": [rows.renamed(*row) for row in found]}, select
        )

    def list_renamed(self, found: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        """List every key that a dry run would rename."""
        for path, keys in found if self.dry_run else ():
            lines = [f"{old} -> {new}" for old, new in keys.items()]
            output.changes(lines, "key", "" if path == "/" else path)

    def _say_dangers(self, document: Document) -> None:
        """Name what is carried along though it would run where OUT is unpickled."""
        if self.verb == "fix":
            return  # which says by itself what it does with them
        found = dict.fromkeys(map(name_of, dangers(document.root)))
        if found:
            fix = command("fix", self.source, door.beside(document, "fixed"))
            output.note(
                f"carries calls along that would run: {listed(found)}; {fix} leaves them out"
            )

    def _write(self, to: Output, document: Document) -> Checked | None:
        if self.dry_run:
            return None
        times = 2 if self.verify else 1

        def total() -> int:
            return times * nbytes(document.root)

        with output.progress(f"writing {to.path}", total) as advance:
            return to.write(
                document,
                force=self.force,
                progress=advance,
                max_shard_size=self.max_shard_size,
                verify=self.verify,
                share=self.verb != "fix",  # what is called repaired was read
                texts=self._around.carried,
            )

    def _edit(self, document: Document, done: str, data: dict[str, Any], exit_code: int) -> int:
        """Change the source itself and say so; returns the exit code."""
        from ckptfix.edit import inplace

        try:
            edit = inplace.prepare(document)
            if not self.dry_run:
                inplace.apply(edit)
        except InPlaceError as error:
            raise error.suggest(Hint("write a copy", _copying(self.source))) from None
        verb = "would change" if self.dry_run else "changed"
        size = output.size(edit.nbytes)
        told = f"{verb} {self.source} in place: {done}; {size} of it rewritten"
        data = {"container": document.container, **data}
        return self._answer(told, done, data, [], exit_code)

    def _answer(
        self,
        told: str,
        done: str,
        data: dict[str, Any],
        left_out: Sequence[tuple[str, str]],
        exit_code: int,
    ) -> int:
        container = data["container"] if self.output is None else self.container.name
        fields = {
            "in_place": self.output is None,
            "dry_run": self.dry_run,
            "done": done,
            "output_container": container,
            "left_out": [{"path": path, "kind": kind} for path, kind in left_out],
            **data,
        }
        path = self.source if self.output is None else self.output.path
        return output.answer(fields, told, input=self.source, output=path, exit_code=exit_code)


def _copying(source: str) -> Command:
    """The command that was given, with an output beside its source."""
    context = click.get_current_context()
    stem, extension = split_extension(source)
    if extension.lower() not in EXTENSIONS:
        stem, extension = source, ".pt"
    out = unused(f"{stem}.fixed", extension)
    return Command("ckptfix", (source, out), context.info_name, tuple(_given(context)))


def _no_output(source: str) -> Misuse:
    """The refusal where OUT is not given, with a command that has one."""
    in_place = any(param.name == "in_place" for param in click.get_current_context().command.params)
    what = "OUT is missing" + ("; to change IN itself, add --in-place" if in_place else "")
    return Misuse(what, Hint("write a copy", _copying(source)) if Place(source).exists else None)


def _given(context: click.Context) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The options that a command was given, but for those that say how IN itself is changed."""
    for param in context.command.params:
        value = context.params.get(param.name or "")
        if not isinstance(param, click.Option) or param.name in ("in_place", "dry_run", "to"):
            continue
        name = param.opts[0].removeprefix("--")
        if param.is_flag and value:
            yield name, ()
        for one in value if param.multiple and value else () if param.is_flag else (value,):
            if one not in (None, (), param.default):
                yield name, tuple(map(str, one)) if isinstance(one, tuple) else (str(one),)


_SAID: Mapping[Checked | None, str] = {
    "shared": "; bytes shared, not read",
    "verified": "; read back and compared",
}
"""What is said of the bytes, where it is not the usual thing."""


# --- the options that make one

_IN = click.argument("source", metavar="IN", type=paths.Read())
_TO = click.option(
    "--to",
    type=click.Choice(list(door.TO)),
    help="The container of OUT, whatever its extension says.",
)
_DRY_RUN = click.option(
    "--dry-run", "-n", is_flag=True, help="Say what would be done; write nothing."
)
_FORCE = click.option("--force", "-f", is_flag=True, help="Replace OUT if it is there.")
_VERIFY = click.option(
    "--verify", is_flag=True, help="Read OUT back from the disk, and compare every byte."
)


def writes(function: _Function) -> _Function:
    """`IN OUT --to --force --dry-run --json`, which a command gets as its `job`."""
    out = click.argument("out", metavar="OUT", required=False, type=paths.Out())
    decorators = (options.as_json, _DRY_RUN, _VERIFY, _FORCE, _TO, out, _IN)
    return _decorated(_with_job(function), decorators)


def edits(function: _Function) -> _Function:
    """As `writes`; or `--in-place IN` without OUT."""
    out = click.argument("out", metavar="[OUT]", required=False, type=paths.Out())
    flag = click.option("--in-place", is_flag=True, help="Change IN itself; no OUT is written.")
    decorators = (options.as_json, _DRY_RUN, _VERIFY, _FORCE, flag, _TO, out, _IN)
    return _decorated(_with_job(function), decorators)


def _decorated(function: _Function, decorators: Sequence[Callable[[Any], Any]]) -> _Function:
    decorated: Any = function
    for decorate in decorators:
        decorated = decorate(decorated)
    return cast("_Function", decorated)


def _with_job(function: _Function) -> _Function:
    """A command that is called with the job which its options describe."""

    @functools.wraps(function)
    def called(
        *,
        source: str,
        out: str | None,
        to: str | None,
        force: bool,
        dry_run: bool,
        verify: bool,
        in_place: bool = False,
        max_shard_size: int | None = None,
        **others: Any,
    ) -> Any:
        to_write = None if in_place else _resolved(source, out, to, max_shard_size)
        if in_place and (out or to):
            raise Misuse(f"{'OUT' if out else '--to'} and --in-place: give one of them")
        if in_place and verify:
            raise Misuse(
                "--verify reads OUT back, and --in-place leaves the weights where they are; "
                f"to read them: {command('check', source, read_data=True)}"
            )
        job = Job(
            click.get_current_context().info_name or "",
            source,
            to_write,
            force=force,
            dry_run=dry_run,
            max_shard_size=max_shard_size,
            verify=verify,
        )
        return function(job=job, **others)

    return cast("_Function", called)


def _resolved(source: str, out: str | None, to: str | None, max_shard_size: int | None) -> Output:
    """What OUT and `--to` mean together. Raises a usage error, or `UnsupportedError`."""
    if out is None:
        raise _no_output(source)
    if max_shard_size is not None and to not in (None, "shards"):
        raise Misuse(f"--max-shard-size is for shards, and --to {to} writes one file")
    if max_shard_size is None or to is not None or out.endswith("/"):
        return door.resolve(out, to, source)
    if out.lower().endswith(EXTENSIONS):
        raise click.BadParameter(
            f"{out} is named like a file, and shards want a folder: give {out}/",
            param_hint="OUT",
        )
    return door.resolve(f"{out}/")

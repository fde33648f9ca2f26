"""Writing files: whole or not at all, whatever goes wrong, and the same bytes by every way."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfix.bytes.engine import crc32
from ckptfix.bytes.journal import Patch
from ckptfix.bytes.place import Place
from ckptfix.bytes.source import CHUNK, BytesSource, FileSource
from ckptfix.bytes.span import Span
from ckptfix.errors import CkptfixError, DamagedError, OutputExistsError, ReadError, WriteError
from tests.helpers import Computed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ckptfix.bytes.copy import Sink

DATA = os.urandom(3 * CHUNK + 12_345)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    path = tmp_path_factory.mktemp("source") / "data"
    path.write_bytes(DATA)
    return FileSource(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds an old file and nothing else."""
    (tmp_path / "out").write_bytes(b"old")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_as_before(folder: Path) -> bool:
    return names(folder) == ["out"] and (folder / "out").read_bytes() == b"old"


def write(path: Path, data: bytes = b"new", **options: Any) -> None:
    with Place(path).publish(**options) as sink:
        sink.write(data)


# --- whole or not at all


def test_the_old_file_stands_until_the_new_one_is_whole(folder: Path) -> None:
    with Place(folder / "out").publish(force=True) as sink:
        sink.write(b"new")
        sink.flush()
        assert (folder / "out").read_bytes() == b"old"
    assert (folder / "out").read_bytes() == b"new"
    assert names(folder) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, DamagedError])
def test_an_error_while_writing_leaves_the_old_file(
    folder: Path, error: type[BaseException]
) -> None:
    with pytest.raises((error, WriteError)):
        write_and_stop(folder / "out", error("stop"))
    assert is_as_before(folder)


def write_and_stop(path: Path, error: BaseException) -> None:
    with Place(path).publish(force=True) as sink:
        sink.write(DATA)
        raise error


def test_verify_sees_the_whole_new_file_and_can_stop_it(folder: Path) -> None:
    def verify(place: Place) -> None:
        seen.append(read_file(place.name))
        raise DamagedError("no")

    seen: list[bytes] = []
    with pytest.raises(DamagedError, match="no"):
        write(folder / "out", DATA, force=True, check=verify)
    assert seen == [DATA]
    assert is_as_before(folder)


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


CALLS = ["pwrite", "fsync", "replace", "fchmod", "open", "link"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_system_leaves_the_old_file(
    folder: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call fails at its first, second and third use, as a full disk makes it."""
    real = getattr(os, call)
    for allowed in range(3):
        count = 0

        def failing(*args: Any, allowed: int = allowed, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > allowed:
                raise OSError(number, os.strerror(number))
            return real(*args, **options)

        monkeypatch.setattr(os, call, failing)
        error = error_of_writing(folder / "out")
        monkeypatch.setattr(os, call, real)
        if error is None:  # it is not called so often, or not needed
            assert (folder / "out").stat().st_size == len(DATA)
            (folder / "out").write_bytes(b"old")
        else:
            assert is_as_before(folder)
            assert error.message.startswith(f"{folder / 'out'}: cannot be written: ")
            assert ("df -h" in str(error.hint)) == (number != errno.EIO)


def error_of_writing(path: Path) -> WriteError | None:
    try:
        with Place(path).publish(force=True) as sink:
            sink.write(DATA)
            sink.patch(Patch(5, DATA[5:10], b"patch"))
    except WriteError as error:
        return error
    return None


def test_without_force_nothing_is_replaced(folder: Path) -> None:
    with pytest.raises(OutputExistsError, match="is there already"):
        write(folder / "out")
    assert is_as_before(folder)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(OutputExistsError, match="is there already"):
        write(tmp_path / "out", check=lambda _: appear(tmp_path / "out"))
    assert is_as_before(tmp_path)


def appear(path: Path) -> None:
    path.write_bytes(b"old")


def no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, "a file system without hard links")


def test_file_systems_without_hard_links_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


# --- where it goes


def test_the_mode_of_an_old_file_is_kept(folder: Path) -> None:
    (folder / "out").chmod(0o640)
    write(folder / "out", force=True)
    assert stat.S_IMODE((folder / "out").stat().st_mode) == 0o640


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/out")
    write(tmp_path / "link")
    assert (tmp_path / "far" / "out").read_bytes() == b"new"
    with pytest.raises(OutputExistsError):
        write(tmp_path / "link")
    write(tmp_path / "link", b"newer", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "out").read_bytes() == b"newer"
    assert (names(tmp_path), names(tmp_path / "far")) == (["far", "link"], ["out"])


def test_other_names_of_the_old_file_keep_its_contents(folder: Path) -> None:
    os.link(folder / "out", folder / "other name")
    write(folder / "out", force=True)
    assert (folder / "other name").read_bytes() == b"old"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "no" / "out", "does not exist"),
        (lambda folder: folder / ("n" * 256), "cannot be written"),
        (a_pipe, "is not a regular file"),
    ],
)
def test_places_that_cannot_be_written_are_refused(
    tmp_path: Path, place: Callable[[Path], Path], words: str
) -> None:
    path = place(tmp_path)
    before = names(tmp_path)
    with pytest.raises(WriteError, match=words) as caught:
        write(path, force=True)
    assert caught.value.message.startswith(f"{path}: ")
    assert names(tmp_path) == before


def test_the_hint_makes_the_folder_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "out"
    with pytest.raises(WriteError, match="does not exist") as caught:
        write(path)
    _, _, command = str(caught.value.hint).partition(": ")
    subprocess.run(command, shell=True, check=True)
    write(path)
    assert path.read_bytes() == b"new"


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255))
    assert (tmp_path / ("n" * 255)).read_bytes() == b"new"


def test_a_pipe_is_no_checkpoint_and_stops_nobody(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="not a regular file"):
        FileSource(a_pipe(tmp_path))


# --- copying


def fails_with(number: int) -> Callable[..., int]:
    def copy_file_range(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return copy_file_range


def stops_halfway() -> Callable[..., int]:
    """Copies a little, then is on another file system."""
    real, calls = os.copy_file_range, iter(range(10))

    def copy_file_range(src: int, dst: int, count: int, offset: int, position: int) -> int:
        if next(calls) < 2:
            return real(src, dst, min(count, 1000), offset, position)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    return copy_file_range


@pytest.fixture(
    params=["kernel", "ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "EPERM", "halfway", "absent"]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way that systems answer when they are asked to copy inside the kernel."""
    how: str = request.param
    if not hasattr(os, "copy_file_range"):
        if how != "kernel":
            pytest.skip("no copy_file_range here")
    elif how == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif how == "halfway":
        monkeypatch.setattr(os, "copy_file_range", stops_halfway())
    elif how != "kernel":
        monkeypatch.setattr(os, "copy_file_range", fails_with(getattr(errno, how)))
    return how


@pytest.mark.usefixtures("way")
def test_every_way_of_copying_gives_the_same_bytes(source: FileSource, tmp_path: Path) -> None:
    computed = Computed(b"0123456789")
    memory = BytesSource(DATA)
    parts: list[Span | bytes] = [
        b"header",
        Span(source, 7, 2 * CHUNK),
        Span(computed, 0, 10),
        Span(source, 0, 0),
        Span(memory, 5, CHUNK + 1),
        b"",
        Span(source, len(DATA) - 3, 3),
    ]
    counts: list[int] = []
    with Place(tmp_path / "out").publish(progress=counts.append) as sink:
        for part in parts:
            sink.copy(part)
        copied = sink.position
        total = sink.copy_summed([part for part in parts if isinstance(part, Span)]).value()
    meant = b"".join(part if isinstance(part, bytes) else part.read() for part in parts)
    spans = b"".join(part.read() for part in parts if isinstance(part, Span))
    assert (tmp_path / "out").read_bytes() == meant + spans
    assert copied == len(meant)
    assert total == zlib.crc32(spans)
    assert sum(counts) == 2 * len(spans)


@pytest.mark.usefixtures("way")
def test_a_source_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    span = Span(FileSource(tmp_path / "source"), 0, len(DATA))
    os.truncate(tmp_path / "source", CHUNK + 5)
    for act in (copy, copy_summed):
        with (
            pytest.raises(CkptfixError, match="source: "),
            Place(tmp_path / "out").publish() as sink,
        ):
            act(sink, span)
    assert names(tmp_path) == ["source"]


def copy(sink: Sink, span: Span) -> None:
    sink.copy(span)


def copy_summed(sink: Sink, span: Span) -> None:
    sink.copy_summed([span]).value()


def test_an_error_while_copying_in_the_kernel_is_no_reason_to_go_on(
    source: FileSource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    monkeypatch.setattr(os, "copy_file_range", fails_with(errno.ENOSPC))
    with (
        pytest.raises(WriteError, match="no space left"),
        Place(folder / "out").publish(force=True) as sink,
    ):
        sink.copy(Span(source, 0, len(DATA)))
    assert is_as_before(folder)


def test_patching_goes_over_what_is_there_and_writing_goes_on_at_the_end(
    source: FileSource, tmp_path: Path
) -> None:
    with Place(tmp_path / "out").publish() as sink:
        sink.write(b"0123456789")
        sink.patch(Patch(2, b"23", b"ab"))
        sink.copy(Span(source, 0, 5))
        sink.patch(Patch(9, b"9" + DATA[:1], b"cd"))
        sink.write(b"end")
        assert sink.position == 18
    assert (tmp_path / "out").read_bytes() == b"01ab45678cd" + DATA[1:5] + b"end"


# --- checksums

LENGTHS = st.one_of(st.integers(0, 300), st.integers(CHUNK - 3, len(DATA)))


@given(st.integers(0, len(DATA)), LENGTHS)
def test_crc32_is_that_of_zlib(source: FileSource, offset: int, length: int) -> None:
    length = min(length, len(DATA) - offset)
    meant = zlib.crc32(b"head" + DATA[offset : offset + length])
    for one in (source, BytesSource(DATA)):
        first, second = Span(one, offset, length).slice(0, length // 3), Span(one, offset, length)
        rest = second.slice(length // 3, length - length // 3)
        assert crc32([b"head", first, rest]) == meant


def test_crc32_past_the_end_is_an_error(source: FileSource) -> None:
    for span in (Span(source, 1, len(DATA)), Span(source, len(DATA), 1)):
        with pytest.raises(DamagedError, match="ends before"):
            crc32([span])


@pytest.mark.parametrize("length", [100, 2 * CHUNK])
def test_a_checked_span_with_another_checksum_leaves_nothing(
    source: FileSource, length: int, tmp_path: Path
) -> None:
    right = zlib.crc32(DATA[:length])
    with Place(tmp_path / "right").publish() as sink:
        sink.check(Span(source, 0, length, right), "w")
        sink.check(Span(source, 0, length), "without one")
    with (
        pytest.raises(DamagedError, match="the bytes of w do not have the checksum on record"),
        Place(tmp_path / "wrong").publish() as sink,
    ):
        sink.check(Span(source, 0, length, right ^ 1), "w")
    assert names(tmp_path) == ["right"]


def test_small_spans_of_several_files_are_copied_in_order(folder: Path) -> None:
    sources = []
    for name in "ab":
        (folder / name).write_bytes(os.urandom(50_000))
        sources.append(FileSource(folder / name))
    spans = [Span(source, at, 100) for at in range(0, 49_900, 777) for source in sources]
    with Place(folder / "new").publish() as sink:
        for span in spans:
            sink.copy(span)
    assert (folder / "new").read_bytes() == b"".join(span.read() for span in spans)


def test_names_of_temporary_files_that_are_taken_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / ".out.pt.00000000.tmp"
    taken.write_bytes(b"someone else's")
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    with pytest.raises(WriteError, match="no name is free"), Place(tmp_path / "out.pt").publish():
        pass
    assert [path.name for path in tmp_path.iterdir()] == [taken.name]
    assert taken.read_bytes() == b"someone else's"


# --- what is there


def test_a_place_says_what_is_there_and_what_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/y", "b/x", "a"):
        (tmp_path / name).write_bytes(name.encode())
    folder = Place(tmp_path)
    assert folder.is_folder
    assert folder.names() == ["a", "b"]
    assert list(folder.files()) == ["a", "b/x", "b/y"]
    assert folder.below("a").folder.names() == ["a", "b"]
    assert folder.below("a").open().read(0, 1) == b"a"
    assert not folder.below("none").exists
    assert (Place("a").folder.name, Place("d/").folder.name) == (".", ".")
    with pytest.raises(ReadError, match="none: no such file"):
        folder.below("none").names()


def test_two_names_of_one_file_are_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    os.link(tmp_path / "a", tmp_path / "b")
    a, b = Place(tmp_path / "a"), Place(tmp_path / "b")
    assert a.is_same(b)
    assert not a.is_same(Place(tmp_path / "none"))

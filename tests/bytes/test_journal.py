"""The rollback journal: after any failure a file is the old one or the new one, never a mixture."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptfix.bytes import journal
from ckptfix.bytes.journal import Patch
from ckptfix.errors import BusyError, ReadError
from tests.helpers import peak_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OLD = bytes(range(200))
PATCHES = [Patch(10, OLD[10:60], b"N" * 50), Patch(100, OLD[100:104], b"crc!")]
NEW = OLD[:10] + b"N" * 50 + OLD[60:100] + b"crc!" + OLD[104:]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def edit(path: Path, verify: Any = lambda: None) -> None:
    with journal.locked(path) as descriptor:
        journal.apply(descriptor, path, PATCHES, verify)


def left(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


class Stop(BaseException):
    """Power off: nothing that a process still wants to do happens."""


class Calls:
    """Counts the calls that change a disk; those that `failing` names raise `error` instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.failing: Any = ()
        self.error: BaseException = Stop()
        for name in ("write", "fsync", "unlink"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.count += 1
            if self.count in self.failing:
                raise self.error
            return call(*arguments)

        return counted

    def fail(self, failing: Any, error: BaseException) -> None:
        self.count, self.failing, self.error = 0, failing, error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def every(calls: Calls, file: Path, error: BaseException, *, lasting: bool) -> Iterator[bool]:
    """Edit with the Nth call failing, for each N; yields whether the edit raised, then goes on."""
    edit(file)
    total = calls.count
    assert total > 5
    for number in range(1, total + 1):
        file.write_bytes(OLD)
        calls.fail(range(number, total + 100 if lasting else number + 1), error)
        try:
            edit(file)
        except (OSError, Stop):
            calls.fail((), error)
            yield True
        else:
            calls.fail((), error)
            yield False


def test_an_edit_leaves_the_new_bytes_and_no_journal(file: Path) -> None:
    seen = []
    edit(file, lambda: seen.append((file.read_bytes(), left(file))))
    assert seen == [(NEW, ["file", "file.ckptfix-journal"])]
    assert (file.read_bytes(), left(file)) == (NEW, ["file"])
    assert journal.recover(file) is None


def test_what_verification_refuses_is_put_back(file: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        edit(file, lambda: print(1 / 0))  # noqa: T201
    assert (file.read_bytes(), left(file)) == (OLD, ["file"])


def test_a_call_that_fails_once_leaves_the_old_file_or_the_new(file: Path, calls: Calls) -> None:
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")):
        for raised in every(calls, file, error, lasting=False):
            assert (file.read_bytes(), left(file)) == (OLD if raised else NEW, ["file"])


def test_a_disk_that_fails_for_good_is_mended_by_the_next_opening(file: Path, calls: Calls) -> None:
    for raised in every(calls, file, OSError(errno.EIO, "broken"), lasting=True):
        journal.recover(file)
        assert (file.read_bytes(), left(file)) == (OLD if raised else NEW, ["file"])


def test_power_off_at_any_call_is_mended_by_the_next_opening(file: Path, calls: Calls) -> None:
    messages, contents = [], []
    for raised in every(calls, file, Stop(), lasting=True):
        assert raised
        messages.append(journal.recover(file))
        contents.append(file.read_bytes())
        assert left(file) == ["file"]
    # the last call only makes the removal of the journal last
    assert contents == [OLD] * (len(contents) - 1) + [NEW]
    assert any("was put back as it was" in str(message) for message in messages)


def test_a_rollback_that_is_interrupted_goes_on_next_time(file: Path, calls: Calls) -> None:
    def torn() -> bytes:
        file.write_bytes(OLD)
        calls.fail(range(5, 100), Stop())  # after the journal, its folder and one patch
        with pytest.raises(Stop):
            edit(file)
        calls.fail((), Stop())
        return file.read_bytes()

    assert torn() not in (OLD, NEW)
    journal.recover(file)
    total = calls.count
    for number in range(1, total + 1):
        torn()
        calls.fail(range(number, 100), Stop())
        with pytest.raises(Stop):
            journal.recover(file)
        calls.fail((), Stop())
        journal.recover(file)
        assert (file.read_bytes(), left(file)) == (OLD, ["file"])


def whole_journal(file: Path) -> bytes:
    data = []
    beside = file.parent / "file.ckptfix-journal"
    edit(file, lambda: data.append(beside.read_bytes()))
    file.write_bytes(OLD)
    return data[0]


def test_a_journal_that_is_cut_short_or_damaged_changes_nothing(file: Path) -> None:
    whole = whole_journal(file)
    torn = [whole[:length] for length in range(len(whole))]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 20, 99)]
    for data in [*torn, *flipped, bytes(len(whole))]:
        (file.parent / "file.ckptfix-journal").write_bytes(data)
        assert "before it changed anything" in str(journal.recover(file))
        assert (file.read_bytes(), left(file)) == (OLD, ["file"])


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
@given(taken=st.lists(st.booleans(), min_size=len(OLD), max_size=len(OLD)))
def test_any_mixture_of_old_and_new_bytes_is_put_back(file: Path, taken: list[bool]) -> None:
    whole = whole_journal(file)
    pairs = zip(taken, OLD, NEW, strict=True)
    file.write_bytes(bytes(new if take else old for take, old, new in pairs))
    (file.parent / "file.ckptfix-journal").write_bytes(whole)
    assert journal.recover(file) is not None
    assert (file.read_bytes(), left(file)) == (OLD, ["file"])


@pytest.mark.parametrize("other", [OLD[:-1], OLD + b"x", OLD[:20] + b"?" + OLD[21:], b""])
def test_another_file_under_the_name_is_left_alone(file: Path, other: bytes) -> None:
    whole = whole_journal(file)
    (file.parent / "file.ckptfix-journal").write_bytes(whole)
    file.write_bytes(other)
    with pytest.raises(ReadError, match="something else has changed the file") as caught:
        journal.recover(file)
    assert caught.value.hint is not None
    assert f"rm {file}.ckptfix-journal" in str(caught.value.hint)
    assert file.read_bytes() == other


def sealed(count: int, body: bytes, size: int = len(OLD)) -> bytes:
    """A journal with a right checksum, as anybody can make one."""
    data = struct.pack("<16s2Q", b"ckptfix journal\n", size, count) + body
    return data + hashlib.blake2b(data, digest_size=16).digest()


def patch(offset: int, length: int, data: bytes) -> bytes:
    return struct.pack("<2Q", offset, length) + data


TWO = OLD[:2]
FORGED = {
    "more patches than bytes": sealed(1 << 63, b""),
    "one patch, of nothing": sealed(1, b""),
    "no patch": sealed(0, b""),
    "a thousand patches": sealed(1000, patch(0, 0, b"") * 1000),
    "a length of 2**63": sealed(1, patch(0, 1 << 63, b"ab")),
    "a length of 2**64 - 1": sealed(1, patch(0, (1 << 64) - 1, b"ab")),
    "an offset of 2**63": sealed(1, patch(1 << 63, 1, b"ab")),
    "an offset of 2**64 - 1": sealed(1, patch((1 << 64) - 1, 1, b"ab")),
    "new bytes that end too soon": sealed(1, patch(0, 2, TWO + b"x")),
    "bytes past the end of the file": sealed(1, patch(len(OLD) - 1, 2, b"xx" + OLD[-1:] + b"x")),
    "patches that overlap": sealed(2, patch(0, 2, b"xx" + TWO) + patch(1, 1, b"y" + TWO[1:])),
    "bytes after the last patch": sealed(1, patch(0, 2, b"xx" + TWO) + b"surplus"),
    "another file's size": sealed(1, patch(0, 2, b"xx" + TWO), len(OLD) + 1),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_journal_that_no_edit_can_have_left_changes_nothing(name: str, file: Path) -> None:
    beside = file.parent / "file.ckptfix-journal"
    beside.write_bytes(FORGED[name])
    with peak_memory(1 << 20), pytest.raises(ReadError, match="something else has changed"):
        journal.recover(file)
    assert (file.read_bytes(), beside.read_bytes()) == (OLD, FORGED[name])


def test_a_large_journal_is_not_held_in_memory(file: Path) -> None:
    data = bytes(20 << 20)
    file.write_bytes(data)
    beside = file.parent / "file.ckptfix-journal"
    beside.write_bytes(sealed(1, patch(0, len(data), b"x" * len(data) + data), len(data)))
    with peak_memory(5 << 20):
        assert "was put back" in str(journal.recover(file))
    assert (file.read_bytes(), left(file)) == (b"x" * len(data), ["file"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_journal_that_is_a_pipe_does_not_stop_a_reader(file: Path) -> None:
    beside = file.parent / "file.ckptfix-journal"
    os.mkfifo(beside)
    script = "import sys; from ckptfix.bytes import journal; journal.recover(sys.argv[1])"
    command = [sys.executable, "-c", script, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert f"{beside}: is not a regular file" in ran.stderr
    assert file.read_bytes() == OLD


def test_a_journal_that_is_a_link_is_not_followed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(whole_journal(file))
    file.write_bytes(NEW)
    (tmp_path / "file.ckptfix-journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReadError, match="cannot be undone"):
        journal.recover(file)
    assert file.read_bytes() == NEW


def test_of_two_editors_the_second_is_refused(file: Path) -> None:
    with journal.locked(file), pytest.raises(BusyError, match="by another process"):
        edit(file)
    edit(file)
    assert file.read_bytes() == NEW


def test_a_file_that_is_being_edited_is_not_rolled_back(file: Path) -> None:
    def look() -> None:
        with pytest.raises(ReadError, match="by another process"):
            journal.recover(file)

    edit(file, look)
    assert file.read_bytes() == NEW

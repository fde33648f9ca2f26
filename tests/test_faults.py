"""Every call that changes a disk fails, in every way, or is the last one: nothing is lost.

In the manner of SQLite's `ioerr` tests: the Nth call fails, for each N that there is. A copy leaves
its input as it was, and of its output the old one or the whole new one; an edit in place leaves the
old file or the new one once it is opened again.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

import ckptfix
from ckptfix.bytes import journal
from tests.conftest import FIXTURES
from tests.faults import Fault, Outcome, Runner
from tests.oracles import unlike
from tests.sharing import KINDS, mounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


# --- inputs: one of each container


def fixture(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(FIXTURES / name, folder))


def large(folder: Path) -> Path:
    """Records that are copied by the kernel and summed on a thread, and others that are not."""
    weights = {"module.large": torch.rand(300, 1000), "module.bias": torch.rand(3)}
    for index in range(4):
        weights[f"module.layers.{index}.weight"] = torch.rand(40, 40)
    torch.save(OrderedDict(weights), folder / "large.pt")
    return folder / "large.pt"


def plain_pickle(folder: Path) -> Path:
    weights = {f"module.{name}": torch.rand(20, 100) for name in "ab"}
    (folder / "plain.pkl").write_bytes(pickle.dumps(weights))
    return folder / "plain.pkl"


def shards(folder: Path) -> Path:
    ckptfix.open(large(folder)).save(folder / "whole.safetensors")
    arguments = ["convert", "whole.safetensors", "shards", "--max-shard-size", "1MB"]
    subprocess.run([sys.executable, "-m", "ckptfix", *arguments], cwd=folder, check=True)
    return folder / "shards"


def damaged(folder: Path) -> Path:
    path = large(folder)
    os.truncate(path, path.stat().st_size - 500)
    return path


def gzipped(folder: Path) -> Path:
    path = large(folder)
    (folder / "in").write_bytes(gzip.compress(path.read_bytes(), 1))
    path.unlink()
    return folder / "in"


def in_a_tar(folder: Path) -> Path:
    path = large(folder)
    with tarfile.open(folder / "in", "w") as archive:
        archive.add(path, "large.pt")
    path.unlink()
    return folder / "in"


def deflated(folder: Path) -> Path:
    path = large(folder)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(folder / "in", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    path.unlink()
    return folder / "in"


CONTAINERS = {
    "zip": large,
    "training": fixture("dataparallel_cuda_training.pt"),
    "legacy": fixture("legacy_dataparallel_cuda.pt"),
    "pickle": plain_pickle,
    "safetensors": fixture("dataparallel.safetensors"),
    "shards": shards,
}


# --- commands that write a copy


class Job(NamedTuple):
    """A command that writes OUT of IN; `before` is the one that wrote the OUT that it replaces."""

    make: Callable[[Path], Path]
    arguments: tuple[str, ...]
    out: str = "out.pt"
    before: tuple[str, ...] = ()


VERBS: dict[str, Job] = {
    "strip-prefix": Job(large, ("strip-prefix",)),
    "add-prefix": Job(large, ("add-prefix",)),
    "rename": Job(large, ("rename", "--sub", "layers", "blocks")),
    "to-cpu": Job(fixture("dataparallel_cuda.pt"), ("to-cpu",)),
    "convert": Job(large, ("convert",)),
    "weights-only": Job(CONTAINERS["training"], ("convert", "--weights-only")),
    "compact": Job(fixture("views.pt"), ("convert", "--compact")),
    "cast": Job(large, ("convert", "--dtype", "float16")),
    "fix": Job(large, ("fix",)),
    "recover": Job(damaged, ("recover",)),
}
"""Every command that writes a checkpoint."""

OUTS = {".pt": "out.pt", ".safetensors": "out.safetensors", "a folder": "out/"}
READ = {**CONTAINERS, "gzip": gzipped, "tar": in_a_tar, "deflated": deflated}
IN_SHARDS = ("convert", "--max-shard-size", "1MB")

COPIES = {
    **{
        f"{verb} to {name}": job._replace(out=out)
        for verb, job in VERBS.items()
        for name, out in OUTS.items()
    },
    **{f"strip-prefix {name}": Job(make, ("strip-prefix",)) for name, make in READ.items()},
    **{
        f"to safetensors {name}": Job(make, ("convert",), "out.safetensors")
        for name, make in READ.items()
        if name != "training"
    },
    **{f"fix {name}": Job(make, ("fix",)) for name, make in CONTAINERS.items()},
    "shard": Job(large, IN_SHARDS, "out/"),
    "shard, other sizes": Job(large, IN_SHARDS, "out/", ("convert", "--max-shard-size", "10KB")),
    "shard, where one file was": Job(large, IN_SHARDS, "out/", ("convert",)),
    "one file, where shards were": Job(large, ("convert",), "out/", IN_SHARDS),
    "shard and cast": Job(large, (*IN_SHARDS, "--dtype", "float16"), "out/"),
    "pieces": Job(large, ("convert", "--to", "dcp"), "out/"),
    "page": Job(large, ("inspect", "--html"), "out.html"),
    "page of differences": Job(shards, ("diff", "--html"), "out.html"),
}
SHORT = ("strip-prefix to .pt", "convert to .safetensors", "shard, other sizes")


def command(job: Job, source: Path, out: str) -> list[str | Path]:
    verb, *options = job.arguments
    if verb == "inspect":
        return [verb, source, *options, out, "--force"]
    if verb == "diff":
        return [verb, source, source.parent / "large.pt", *options, out, "--force"]
    return [verb, source, out, *options, "--force"]


def files_in(folder: Path) -> Files:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def without_strays(files: Files) -> Files:
    return {name: data for name, data in files.items() if not name.endswith(".tmp")}


def visible(files: Files) -> Files:
    """What a reader finds: of shards or pieces, those that the head of them names."""
    if ".metadata" in files:
        told = pickle.loads(files[".metadata"]).storage_data.values()
        return {name: files[name] for name in {".metadata", *(one.relative_path for one in told)}}
    index = next((name for name in files if name.endswith(".index.json")), None)
    if index is None:
        parts = ("-of-", ".distcp")
        return {n: data for n, data in files.items() if not any(part in n for part in parts)}
    names = {index, *json.loads(files[index])["weight_map"].values()}
    return {name: files[name] for name in names}


def put(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(exist_ok=True)


FAILING = (errno.ENOSPC, errno.EIO, errno.EINTR)


def faults(number: int) -> Iterator[Fault]:
    """Everything that may happen at a call."""
    for code in FAILING:
        yield Fault("fail", number, code)
    for code in FAILING[:2]:
        yield Fault("fail on", number, code)
    for kind in ("short", "kill", "tear", "kill after"):
        yield Fault(kind, number)


def is_synced_before_it_is_named(calls: list[str]) -> bool:
    """Whether no file gets its name between a write and the fsync that makes it last."""
    written = False
    for call in calls:
        if written and call in ("link", "replace"):
            return False
        written = call in ("write", "pwrite", "copy_file_range", "ioctl") or (
            written and call != "fsync"
        )
    return True


class Campaign:
    """One command, its output before and after, and all that may happen in between."""

    def __init__(self, runner: Runner, folder: Path, job: Job, tally: Any, *, replaced: bool):
        (folder / "in").mkdir(parents=True)
        self.runner, self.tally, self.job = runner, tally, job
        self.source, self.folder = job.make(folder / "in"), folder / "out"
        self.input = files_in(folder / "in")
        self.in_folder = job.out.endswith("/")
        out = f"{self.folder}/" if self.in_folder else f"{self.folder}/{job.out}"
        self.arguments = command(job, self.source, out)
        self.old: Files = {}
        put(self.folder, {})
        if replaced and self.in_folder:
            before = command(job._replace(arguments=job.before or job.arguments), self.source, out)
            assert self.runner.run(before, self.folder.parent).code in (0, 1)
            self.old = files_in(self.folder)
        elif replaced:
            self.old = {job.out: b"what was there"}
        put(self.folder, self.old)
        self.calls = self.run(Fault()).calls
        self.new = files_in(self.folder)
        self.copied = self.without_cloning()
        assert self.new != {}

    def without_cloning(self) -> Files:
        """What there is where the file system shares no blocks."""
        if "ioctl" not in self.calls:
            return self.new
        put(self.folder, self.old)
        number = self.calls.index("ioctl") + 1
        assert self.run(Fault("fail", number, errno.EOPNOTSUPP)).code in (0, 1)
        return files_in(self.folder)

    def run(self, fault: Fault) -> Outcome:
        return self.runner.run(self.arguments, self.folder.parent, fault)

    def run_all(self) -> None:
        assert len(self.calls) >= 5
        assert is_synced_before_it_is_named(self.calls)
        for number in range(1, len(self.calls) + 1):
            for fault in faults(number):
                put(self.folder, self.old)
                outcome = self.run(fault)
                self.check(fault, outcome)
                self.tally("kills" if outcome.killed else "faults injected")

    def check(self, fault: Fault, outcome: Outcome) -> None:
        found, said = files_in(self.folder), f"{fault} ({self.calls[fault.number - 1]}): {outcome}"
        assert files_in(self.source.parent) == self.input, said
        assert "Traceback" not in outcome.stderr, said
        assert outcome.killed == (fault.kind in ("kill", "tear", "kill after")), said
        if outcome.killed:
            whole = (self.old, self.new, self.copied)
            assert visible(without_strays(found)) in map(visible, whole), said
        elif outcome.code in (0, 1):
            assert without_strays(found) in (self.new, self.copied), said
        else:
            assert re.search("^error: .*cannot be (written|unpacked)", outcome.stderr, re.M), said
            self.check_refused(fault, found, said)
        if not outcome.killed and self.calls[fault.number - 1] not in ("unlink", "rmdir"):
            assert found == without_strays(found), said

    def check_refused(self, fault: Fault, found: Files, said: str) -> None:
        """After an error: the old output; of shards perhaps the new, with some of the old."""
        if not self.in_folder or visible(without_strays(found)) == visible(self.old):
            undone = self.calls[fault.number - 1] not in ("unlink", "rmdir")
            assert not undone or without_strays(found) == self.old, said
        else:
            assert visible(found) == visible(self.new), said


def copies(names: Any) -> Any:
    return pytest.mark.parametrize("name", names)


@copies(SHORT)
def test_a_copy_is_there_whole_or_not_at_all(
    name: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    Campaign(runner, tmp_path, COPIES[name], tally, replaced=True).run_all()


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@copies(COPIES)
def test_every_copy_is_there_whole_or_not_at_all(
    name: str, replaced: bool, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    Campaign(runner, tmp_path, COPIES[name], tally, replaced=replaced).run_all()


@copies(
    [
        name
        for name, job in COPIES.items()
        if job.arguments == ("strip-prefix",) and job.out == "out.pt"
    ]
)
def test_what_is_written_without_faults_is_whole(
    name: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    made = Campaign(runner, tmp_path, COPIES[name], tally, replaced=False)
    assert is_synced_before_it_is_named(made.calls)
    wanted = ckptfix.load_state_dict(made.source)
    found = torch.load(made.folder / "out.pt", map_location="cpu")
    found = found.get("model_state_dict", found)
    assert unlike(dict(found), dict(ckptfix.strip_prefix(wanted))) is None


CLONED = {
    "strip-prefix": Job(large, ("strip-prefix",)),
    "to-cpu": Job(fixture("dataparallel_cuda.pt"), ("to-cpu",)),
    "safetensors": Job(fixture("dataparallel.safetensors"), ("strip-prefix",), "out.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_is_there_whole_or_not_at_all(
    kind: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    with mounted(kind, tmp_path) as disk:
        for name, job in CLONED.items():
            for replaced in (False, True):
                folder = disk / f"{name} {replaced}"
                folder.mkdir()
                campaign = Campaign(runner, folder, job, tally, replaced=replaced)
                assert "ioctl" in campaign.calls
                assert "ftruncate" not in campaign.calls  # it is a clone, and not a copy
                campaign.run_all()


# --- edits in place


def shortened(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The same, after an edit in place that left room for longer names."""

    def made(folder: Path) -> Path:
        path = make(folder)
        command = [sys.executable, "-m", "ckptfix", "strip-prefix", str(path), "--in-place"]
        subprocess.run(command, check=True)
        return path

    return made


def without_checksums(folder: Path) -> Path:
    torch.serialization.set_crc32_options(False)
    try:
        return large(folder)
    finally:
        torch.serialization.set_crc32_options(True)


EDITS = {
    "strip-prefix zip": Job(large, ("strip-prefix",)),
    "strip-prefix training": Job(CONTAINERS["training"], ("strip-prefix",)),
    "strip-prefix safetensors": Job(CONTAINERS["safetensors"], ("strip-prefix",)),
    "strip-prefix without checksums": Job(without_checksums, ("strip-prefix",)),
    "add-prefix zip": Job(shortened(large), ("add-prefix",)),
    "add-prefix safetensors": Job(shortened(CONTAINERS["safetensors"]), ("add-prefix",)),
    "to-cpu": Job(CONTAINERS["training"], ("to-cpu",)),
    "rename": Job(large, ("rename", "--sub", "layers", "l")),
    "rename safetensors": Job(CONTAINERS["safetensors"], ("rename", "--sub", "linears", "l")),
}


class Editing:
    """One edit in place; after whatever happened, the file is opened again."""

    def __init__(self, runner: Runner, folder: Path, job: Job, tally: Any) -> None:
        self.runner, self.tally = runner, tally
        self.file = job.make(folder)
        for path in folder.iterdir():
            if path != self.file:
                path.unlink()
        self.old = self.file.read_bytes()
        first, *rest = job.arguments
        self.arguments: list[str | Path] = [first, self.file, *rest, "--in-place"]
        outcome = self.run(Fault())
        assert outcome.code == 0, outcome
        self.calls, self.new = outcome.calls, self.file.read_bytes()
        assert self.new != self.old

    def run(self, fault: Fault) -> Outcome:
        return self.runner.run(self.arguments, self.file.parent, fault)

    def run_all(self) -> None:
        assert len(self.calls) >= 5
        for number in range(1, len(self.calls) + 1):
            for fault in faults(number):
                self.file.write_bytes(self.old)
                outcome = self.run(fault)
                self.check(fault, outcome)
                self.tally("kills" if outcome.killed else "faults injected")

    def check(self, fault: Fault, outcome: Outcome) -> None:
        said = f"{fault} ({self.calls[fault.number - 1]}): {outcome}"
        assert "Traceback" not in outcome.stderr, said
        assert outcome.killed == (fault.kind in ("kill", "tear", "kill after")), said
        if not outcome.killed:
            assert (outcome.code == 0) or outcome.stderr.startswith("error: "), said
        left = Path(journal.beside(self.file))
        interrupted = left.exists()
        if not outcome.killed and not interrupted:
            assert self.file.read_bytes() == (self.old if outcome.code else self.new), said
        self.open_again(said, interrupted=interrupted)
        if outcome.code == 0:
            assert self.file.read_bytes() == self.new, said

    def open_again(self, said: str, *, interrupted: bool) -> None:
        again = self.runner.run(["inspect", self.file], self.file.parent)
        assert again.code == 0, (said, again)
        assert ("was interrupted" in again.stderr) == interrupted, (said, again)
        assert [path.name for path in self.file.parent.iterdir()] == [self.file.name], said
        assert self.file.read_bytes() in ((self.old,) if interrupted else (self.old, self.new)), (
            said
        )
        if interrupted:
            self.tally("rolled back")


@pytest.mark.parametrize("name", ["strip-prefix zip", "strip-prefix safetensors"])
def test_an_edit_in_place_is_made_or_not(
    name: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    Editing(runner, tmp_path, EDITS[name], tally).run_all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_every_edit_in_place_is_made_or_not(
    name: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    Editing(runner, tmp_path, EDITS[name], tally).run_all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_a_rollback_that_is_killed_goes_on_at_the_next_opening(
    name: str, runner: Runner, tmp_path: Path, tally: Any
) -> None:
    made = Editing(runner, tmp_path, EDITS[name], tally)
    reading: list[str | Path] = ["inspect", made.file]
    for number in range(1, len(made.calls) + 1):
        for again in range(1, 20):
            made.file.write_bytes(made.old)
            assert made.run(Fault("tear", number)).killed
            interrupted = Path(journal.beside(made.file)).exists()
            outcome = made.runner.run(reading, tmp_path, Fault("tear", again))
            if not outcome.killed:
                assert again > 1 or not interrupted
                break
            made.open_again(f"{number}, {again}", interrupted=interrupted and _left(made.file))
            tally("kills of a rollback")


def _left(file: Path) -> bool:
    return Path(journal.beside(file)).exists()


# --- disks that are full


@pytest.mark.parametrize("limit", [0, 1, 4096, 100_000, 1 << 20, 1_200_000])
def test_a_limit_on_the_size_of_files_leaves_the_old_one(limit: int, tmp_path: Path) -> None:
    source, out = large(tmp_path), tmp_path / "out.pt"
    out.write_bytes(b"what was there")
    before = source.read_bytes()
    arguments: list[str | Path] = ["strip-prefix", source, out, "--force"]
    ran = subprocess.run(
        [sys.executable, "-m", "ckptfix", *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (ran.returncode, source.read_bytes()) == (2, before)
    assert ran.stderr.startswith(f"error: {out}: cannot be written: file too large")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.pt", "out.pt"]
    assert out.read_bytes() == b"what was there"


@pytest.mark.parametrize("limit", [0, 1, 400, 4096, 100_000, 1_200_000])
def test_a_limit_on_the_size_of_files_leaves_an_edited_file_as_it_was(
    limit: int, tmp_path: Path
) -> None:
    path = large(tmp_path)
    before = path.read_bytes()
    ran = subprocess.run(
        [sys.executable, "-m", "ckptfix", "strip-prefix", path, "--in-place"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {path}: cannot be changed in place: file too large")
    ckptfix.open(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, ["large.pt"])


@pytest.mark.parametrize("limit", [0, 1, 100_000])
@pytest.mark.parametrize("make", [gzipped, in_a_tar, deflated])
def test_no_room_to_unpack_is_an_error(make: Any, limit: int, tmp_path: Path, tally: Any) -> None:
    source, out = make(tmp_path), tmp_path / "out.pt"
    ran = subprocess.run(
        [sys.executable, "-m", "ckptfix", "strip-prefix", source, out],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (ran.returncode, os.listdir(tmp_path)) == (2, ["in"])
    assert ran.stderr.startswith(f"error: {source}"), ran.stderr
    assert "cannot be unpacked into a temporary file" in ran.stderr
    tally("full disks")


SMALL_DISK = """
mount -t tmpfs -o size={size} none {disk} || exit 77
for command in "strip-prefix in.pt {disk}/out.pt" "convert in.pt {disk}/out.safetensors" \
    "convert in.pt {disk}/shards --max-shard-size 1MB"
do
    {python} -m ckptfix $command && echo written || echo refused
done
ls -A {disk}
umount {disk} && mount -t tmpfs -o size=2m none {disk} || exit 77
cp in.pt {disk}/in.pt
cat /dev/zero > {disk}/filled 2> /dev/null
{python} -m ckptfix strip-prefix {disk}/in.pt --in-place && echo written || echo refused
cmp in.pt {disk}/in.pt && ls -A {disk}
"""


@pytest.mark.parametrize("size", ["64k", "512k", "1m"])
def test_a_full_disk_is_an_error_and_leaves_nothing(size: str, tmp_path: Path, tally: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    large(tmp_path).rename(tmp_path / "in.pt")
    script = SMALL_DISK.format(size=size, disk=disk, python=sys.executable)
    try:
        ran = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip("needs user namespaces")
    assert ran.stdout.split() == [*["refused"] * 4, "filled", "in.pt"], ran
    assert ran.stderr.count("no space left on device") == 4
    assert "Traceback" not in ran.stderr
    tally("full disks", 4)

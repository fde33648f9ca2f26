"""ckptfix beside `cp`, the pasted recipe and other programs: `python benchmarks/run.py`.

Every program runs as a process of its own, in turn, there and back again (A B C, C B A, …), on one
input that lies in the page cache. README.md says what is measured and how. Needs Linux for memory
and bytes written; elsewhere those columns stay empty.
"""

from __future__ import annotations

import argparse
import compileall
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:  # as a script, only its own folder is importable
    sys.path.insert(0, str(HERE.parent))

import ckptfix  # noqa: E402
from benchmarks import machine, measure, report  # noqa: E402
from benchmarks.contenders import CKPTFIX, COUNTED, Contender, Work, copy_of, missing, works  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
SIZES = "64M,512M,2G"
LARGE = ",8G"
ROOM = 1.05
"""Times the size of a checkpoint that has to be free for each file still to be made."""
HELD = 1.2
"""Times the size of a checkpoint that a program takes which holds it in memory."""
LOADS = 4
"""Loads in a process for each run of the others; they take milliseconds."""
SMALLER = defaultdict(lambda: 2.5, {"many-pieces": 50.0})  # of which each piece is a zip
"""How many times smaller than its input an output may be, by the kind of the input."""
LOAD_WORK = "load"
Record = dict[str, Any]


class Bench:
    """One run of the benchmark: its inputs on disk, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.measured: list[Record] = []
        self.inputs: dict[str, Record] = {}
        self.skipped: dict[str, str] = {}

    def run(self) -> None:
        chosen = self.options.only
        for work in works(self.options.peers):
            if chosen and work.name not in chosen:
                continue
            contenders = [one for one in work.contenders if self._takes_part(one)]
            for amount in [self.options.tensors] if work.reads in COUNTED else self.options.sizes:
                if work.reads in COUNTED or self._has_room(work.reads, amount):
                    self._work(work, contenders, amount)
        if not chosen or LOAD_WORK in chosen:
            for amount in self.options.sizes:
                if self._has_room("pt", amount):
                    self._loads(amount)

    def _work(self, work: Work, contenders: list[Contender], amount: int) -> None:
        label = label_of(work.reads, amount)
        print(f"{work.title}, {label}", flush=True)
        source = self._input(work.reads, amount)
        if any("COPY" in one.command for one in contenders) and not copy_of(source).exists():
            copied(source, copy_of(source))
        for number in range(self.options.runs):
            shuffled = random.Random(number).sample(contenders, len(contenders))
            for contender in shuffled if number else contenders:  # tables have them as in round 0
                if contender.name not in self.skipped and self._fits(contender, work, amount):
                    self._once(work, contender, source, amount, number)
        for line in report.medians(self.measured, work.name, label):
            print(f"  {line}", flush=True)

    def _once(
        self, work: Work, contender: Contender, source: Path, amount: int, number: int
    ) -> None:
        target = self.folder / f"out{work.writes}"
        try:
            with removed(target):
                if work.in_place:
                    shutil.copyfile(source, target)
                sample = self._timed(contender, target if work.in_place else source, target)
                if work.writes and size_of(target) < size_of(source) / SMALLER[work.reads]:
                    raise measure.RunError("its output is too small")
        except measure.RunError as error:
            if not contender.peer:
                raise measure.RunError(f"{contender.name}: {error}") from None
            self._skip(contender.name, str(error))
            return
        self._keep(work.name, amount, contender.name, number, sample)

    def _timed(self, contender: Contender, source: Path, target: Path) -> measure.Sample:
        measure.settle()
        measure.warm(source)
        if "COPY" in contender.command:
            measure.warm(copy_of(source))
        return measure.run(contender.words(source, target), self.folder)

    def _keep(self, work: str, amount: int, name: str, number: int, sample: measure.Sample) -> None:
        self.measured.append(
            {
                "work": work,
                "size": label_of(work, amount),
                "amount": amount,
                "contender": name,
                "round": number,
                "wall_s": round(sample.wall, 5),
                "cpu_s": round(sample.cpu, 5),
                "peak_rss_anon": sample.memory,
                "bytes_written": sample.written,
            }
        )

    def _loads(self, amount: int) -> None:
        label = label_of("pt", amount)
        print(f"load_state_dict inside a process, {label}", flush=True)
        path = self._input("pt", amount)
        measure.settle()
        measure.warm(path)
        rounds = str(LOADS * self.options.runs)
        words = [sys.executable, str(HERE / "loading.py"), str(path), rounds]
        told = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout
        for number, pair in enumerate(json.loads(told)):
            for name, wall in zip(report.LOADERS, pair, strict=True):
                sample = measure.Sample(wall, wall, None, None)
                self._keep(LOAD_WORK, amount, name, number, sample)
        for line in report.medians(self.measured, LOAD_WORK, label):
            print(f"  {line}", flush=True)

    def _input(self, kind: str, amount: int) -> Path:
        """The input of one kind and size, made the first time it is asked for."""
        path = self._place(kind, amount)
        if not path.exists():
            words = [sys.executable, str(HERE / "inputs.py"), kind, str(amount), str(path)]
            subprocess.run(words, check=True)
            self.inputs[f"{kind} {label_of(kind, amount)}"] = {"bytes": size_of(path)} | structure(
                path
            )
        return path

    def _place(self, kind: str, amount: int) -> Path:
        suffix = {"safetensors": ".safetensors", "pt": ".pt", "many": ".pt"}.get(kind, "")
        return self.folder / f"{kind}-{amount}{suffix}"

    def _has_room(self, kind: str, amount: int) -> bool:
        """Whether an output fits, and the input where it is not there yet."""
        files = 1 if self._place(kind, amount).exists() else 2
        if shutil.disk_usage(self.folder).free >= ROOM * amount * files:
            return True
        self._skip(f"{kind}, {label_of(kind, amount)}", "there is not enough free space")
        return False

    def _fits(self, contender: Contender, work: Work, amount: int) -> bool:
        """Whether there is memory for a program, beside its output if that lies in memory."""
        if not contender.holds or work.reads in COUNTED:
            return True
        beside = amount if machine.describe(self.folder)["file_system"] == "tmpfs" else 0
        if machine.available_memory() >= HELD * amount + beside:
            return True
        self._skip(f"{contender.name}, {label_of(work.reads, amount)}", "holds all of it in memory")
        return False

    def _takes_part(self, contender: Contender) -> bool:
        rivals = self.options.rivals
        if rivals and not contender.is_ckptfix and contender.name not in rivals:
            return False
        why = missing(contender, self.options.peers)
        if why is not None:
            self._skip(contender.name, why)
        return why is None

    def _skip(self, what: str, why: str) -> None:
        if what not in self.skipped:
            print(f"skipped: {what}: {why}", flush=True)
            self.skipped[what] = why

    def results(self) -> Record:
        """Everything that results.json holds."""
        places = {str(self.options.peers): "PYTHON", str(self.options.out): "FOLDER"}
        words = [places.get(word, word) for word in sys.argv[1:]]
        return {
            "schema": 1,
            "command": shlex.join(["python", "benchmarks/run.py", *words]),
            "runs": self.options.runs,
            "machine": machine.describe(self.folder),
            "versions": machine.versions(self.options.peers),
            "inputs": self.inputs,
            "skipped": self.skipped,
            "measurements": self.measured,
        }


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """Whatever a run leaves at a path is gone afterwards."""
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        with suppress(FileNotFoundError):
            path.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def copied(source: Path, copy: Path) -> None:
    """One file that holds what the input holds."""
    if source.is_dir():
        words = [*CKPTFIX, "convert", str(source), str(copy), "--to", "torch"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    else:
        shutil.copyfile(source, copy)


def structure(path: Path) -> Record:
    """Bytes of the pickle and of the directory of a torch zip: all that an edit in place writes."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        pickle = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        directory = path.stat().st_size - archive.start_dir
    return {"pickle_and_directory": pickle.file_size + directory}


def label_of(kind: str, amount: int) -> str:
    """What a size is called: `2 GiB`, `50,000 tensors`."""
    return f"{amount:,} tensors" if kind in COUNTED else report.bytes_text(amount)


def parse_size(text: str) -> int:
    """The bytes in `64M`, `2G`."""
    match = re.fullmatch(r"(\d+)([KMG])", text.strip().upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 64M or 2G")
    return int(match[1]) * UNITS[match[2]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--sizes", default=SIZES, help=f"of the checkpoints (default {SIZES})")
    add("--large", action="store_true", help="8G as well")
    add("--runs", type=int, default=5, help="of each program (default 5)")
    add("--tensors", type=int, default=50_000, help="in the file of small tensors")
    add("--only", default="", help="these works, such as strip-prefix,in-place,load")
    add("--rivals", default="", help="only these beside ckptfix, such as cp,cp + fsync")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where to work")
    add("--out", type=Path, default=HERE / "results", help="where results go")
    add("--peers", default=sys.executable, help="the Python that has the optional programs")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.tensors < 1:
        parser.error("--runs and --tensors begin at 1")
    names = {work.name for work in works("")} | {LOAD_WORK}
    options.only = set(filter(None, options.only.split(",")))
    if not options.only <= names:
        parser.error(f"--only knows {', '.join(sorted(names))}")
    rivals = {one.name for work in works("") for one in work.contenders if not one.is_ckptfix}
    options.rivals = set(filter(None, options.rivals.split(",")))
    if not options.rivals <= rivals:
        parser.error(f"--rivals knows {', '.join(sorted(rivals))}")
    try:
        texts = (options.sizes + LARGE * options.large).split(",")
        options.sizes = sorted({parse_size(text) for text in texts})
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return options


def main() -> int:
    options = parse()
    compileall.compile_dir(Path(ckptfix.__file__).parent, quiet=1)  # as an installer does it
    with tempfile.TemporaryDirectory(prefix="ckptfix-bench-", dir=options.dir) as folder:
        bench = Bench(options, Path(folder))
        try:
            bench.run()
        except measure.RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        results = bench.results()
    print(report.write(results, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

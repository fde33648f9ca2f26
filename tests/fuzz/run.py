"""Fuzz the readers, guided by coverage: `make fuzz ARGS="--seconds 600 pickle zip"`.

Each target runs in a process of its own under atheris (libFuzzer), a minute unless told, and goes
on with what earlier runs left in `build/fuzz`. An input that breaks a promise is made smaller and
kept in `corpus/TARGET/found-*`; `--keep` chooses, among all inputs so far, a few small ones that
together reach what all of them reach. `tests/test_fuzz_corpus.py` replays both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
BUILD = HERE.parents[1] / "build" / "fuzz"
NAMES = ("pickle", "rewrite", "zip", "torchzip", "safetensors", "legacy", "tar", "file")
MEMORY = 1024  # MiB that a process may hold, the interpreter and the library included
LIMIT = 25  # inputs kept of each target


def main() -> int:
    """Fuzz what is asked for, a line for each target; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, prog="fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="choose what the test suite replays")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.targets or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such target: {', '.join(unknown)}")
    if options.inside:
        inside(names[0], options.seconds)
    if options.keep:
        return max(keep(name) for name in names)
    if not _has_atheris():
        return 2
    lines = [fuzz(name, options.seconds) for name in names]
    print(*(line for line, _ in lines), sep="\n")
    return int(any(found for _, found in lines))


def _has_atheris() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("error: atheris is not installed, or has no wheel for this system", file=sys.stderr)
        print("hint: pip install atheris  (Linux and macOS; some Pythons only)", file=sys.stderr)
        return False
    return True


def inside(name: str, seconds: int) -> None:
    """The process that fuzzes one target, until time is up or something is found."""
    import atheris

    with atheris.instrument_imports(include=["ckptfix"]):
        from tests.fuzz import seeds, targets

    (BUILD / name).mkdir(parents=True, exist_ok=True)
    for data in seeds.of(name):
        (BUILD / name / _digest(data)).write_bytes(data)
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={seconds}", f"-max_len={seeds.LONGEST}", f"-rss_limit_mb={MEMORY}",
        "-timeout=20", "-print_final_stats=1", f"-artifact_prefix={BUILD / name}-",
    ]  # fmt: skip
    atheris.Setup(
        [sys.argv[0], *options, str(BUILD / name), str(CORPUS / name)],
        lambda data: targets.run(name, data) and None,
    )
    atheris.Fuzz()


def fuzz(name: str, seconds: int) -> tuple[str, bool]:
    """Fuzz one target; its line of the summary, and whether something was found."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--inside", f"--seconds={seconds}", name]
    ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    log = ran.stderr
    (BUILD / f"{name}.log").write_text(log, encoding="utf-8")
    units = _last(r"stat::number_of_executed_units: (\d+)", log) or _last(r"#(\d+)\s", log)
    edges, inputs = _last(r"cov: (\d+)", log), _last(r"corp: (\d+)", log)
    artifact = re.search(r"Test unit written to (\S+)", log)
    if artifact:
        kept = _keep_found(name, Path(artifact[1]).read_bytes())
        print(log[-3000:], f"kept as {kept}", sep="\n", file=sys.stderr)
    failed = artifact is not None or ran.returncode != 0
    state = "FAILED, see above and its log" if failed else "nothing found"
    line = (
        f"{name:<12}{units:>10,} runs {seconds:>5} s {edges:>6} edges {inputs:>5} inputs  {state}"
    )
    print(line, file=sys.stderr)
    return line, failed


def _last(pattern: str, log: str) -> int:
    return int(([0, *re.findall(pattern, log)])[-1])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _keep_found(name: str, data: bytes) -> Path:
    small = minimised(name, data)
    path = CORPUS / name / f"found-{_digest(small)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(small)
    return path


def minimised(name: str, data: bytes) -> bytes:
    """`data` with as much cut out as leaves the failure what it is."""
    wanted = failure(name, data)
    size = len(data) // 2 if wanted else 0
    while size:
        start = 0
        while start < len(data):
            shorter = data[:start] + data[start + size :]
            if failure(name, shorter) == wanted:
                data = shorter
            else:
                start += size
        size //= 2
    return data


def failure(name: str, data: bytes) -> object:
    """The kind and the place of what a target raises; None where it does not."""
    from tests.fuzz import targets

    try:
        targets.run(name, data)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is compared
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return type(error), trace and (trace.tb_frame.f_code.co_name, trace.tb_lineno)
    return None


def keep(name: str) -> int:
    """Replace what the suite replays by a selection of all inputs so far, the shortest first."""
    folders = (BUILD / name, CORPUS / name)
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    inputs = {path.read_bytes() for path in files if not path.name.startswith("found-")}
    news: list[tuple[int, bytes]] = []
    seen: set[object] = set()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        new = steps(name, data) - seen
        seen |= new
        news.append((len(new), data))
    chosen = sorted(((count, data) for count, data in news if count), reverse=True)[:LIMIT]
    for path in CORPUS.joinpath(name).glob("*"):
        if not path.name.startswith("found-"):
            path.unlink()
    for _, data in chosen:
        CORPUS.joinpath(name).mkdir(parents=True, exist_ok=True)
        CORPUS.joinpath(name, _digest(data)).write_bytes(data)
    print(f"{name:<12}{len(chosen):>4} of {len(inputs)} inputs kept, {len(seen)} steps reached")
    return 0


def steps(name: str, data: bytes) -> set[object]:
    """The steps from line to line inside ckptfix that an input takes."""
    from tests.fuzz import targets

    taken: set[object] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if f"{os.sep}ckptfix{os.sep}" not in frame.f_code.co_filename:
            return None
        last = 0

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            taken.add((frame.f_code, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        targets.run(name, data)
    finally:
        sys.settrace(None)
    return taken


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks: a tiny run of all of them, for what they write, never for how fast it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "run.py"
WORKS = {
    "strip-prefix", "to-safetensors", "from-safetensors", "in-place", "many", "inspect", "load",
    "cast", "read-data", "rows", "columns", "to-dcp", "many-pieces", "inspect-pieces",
}  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they look into /proc")


def bench(*arguments: str | Path) -> Any:
    words = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of one run at 1 MiB, which leaves nothing else behind."""
    out, work = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("work")
    small = ("--sizes", "1M", "--runs", "1", "--tensors", "200")
    done = bench(*small, "--dir", work, "--out", out)
    assert done.returncode == 0, done.stderr
    assert not list(work.iterdir())
    return out


def test_every_work_is_measured_against_its_rivals(results: Path) -> None:
    rows = json.loads((results / "results.json").read_text("utf-8"))["measurements"]
    assert {row["work"] for row in rows} == WORKS
    assert all(row["wall_s"] > 0 for row in rows)
    written = {row["contender"]: row["bytes_written"] for row in rows if row["size"] == "1 MiB"}
    assert min(written["ckptfix strip-prefix"], written["cp"], written["pasted recipe"]) > 1 << 20
    assert written["ckptfix strip-prefix --in-place"] < 1 << 16


def test_the_table_has_the_bars_and_the_machine(results: Path) -> None:
    text = (results / "results.md").read_text("utf-8")
    assert "| ckptfix strip-prefix, 1 MiB | ≤ 1.15 x cp |" in text
    assert "| ckptfix.load_state_dict, 1 MiB | ≤ 1.2 x torch.load(mmap=True) |" in text
    assert "writes ≤ 4 x (pickle + directory)" in text
    assert "cores" in text


def test_the_plot_is_an_image_with_every_program(results: Path) -> None:
    drawn = ElementTree.parse(results / "results.svg").getroot()
    words = {node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"ckptfix strip-prefix", "pasted recipe", "cp", "1 MiB"} <= words


def test_only_the_rivals_that_are_named_take_part(tmp_path: Path) -> None:
    out = tmp_path / "results"
    small = ("--sizes", "1M", "--runs", "5", "--only", "strip-prefix", "--rivals", "cp")
    assert bench(*small, "--dir", tmp_path, "--out", out).returncode == 0
    rows = json.loads((out / "results.json").read_text("utf-8"))["measurements"]
    assert {row["contender"] for row in rows} == {"ckptfix strip-prefix", "ckptfix to-cpu", "cp"}
    shown = r"\| ≤ 1\.15 x cp \| (\S+) x \((\S+) to (\S+)\) \|"
    found = re.search(shown, (out / "results.md").read_text("utf-8"))
    assert found is not None
    middle, low, high = map(float, found.groups())
    assert low <= middle <= high


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sizes", "2"),
        ("--sizes", "0G"),
        ("--only", "nothing"),
        ("--rivals", "nobody"),
        ("--runs", "0"),
    ],
)
def test_a_wrong_option_is_refused(arguments: tuple[str, str], tmp_path: Path) -> None:
    refused = bench(*arguments, "--out", tmp_path / "results")
    assert refused.returncode == 2
    assert "error: " in refused.stderr
    assert not (tmp_path / "results").exists()

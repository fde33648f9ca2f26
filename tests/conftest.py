"""Fixtures for every module: the files in `fixtures/`, one test each; what campaigns count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = sorted(path for path in FIXTURES.iterdir() if path.suffix in (".pt", ".safetensors"))
TORCH_ZIPS = [path for path in CHECKPOINTS if path.read_bytes().startswith(b"PK")]
LEGACY = [path for path in CHECKPOINTS if path.read_bytes().startswith(b"\x80\x02\x8a\x0a")]
SAFETENSORS = [path for path in CHECKPOINTS if path.suffix == ".safetensors"]


@pytest.fixture(params=CHECKPOINTS, ids=lambda path: path.name)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Each file in `fixtures/`; tests copy it, or leave it as it is."""
    path: Path = request.param
    return path


@pytest.fixture(params=TORCH_ZIPS, ids=lambda path: path.name)
def torch_zip_file(request: pytest.FixtureRequest) -> Path:
    """Each of them that is a torch zip."""
    path: Path = request.param
    return path


@pytest.fixture(params=LEGACY, ids=lambda path: path.name)
def legacy_file(request: pytest.FixtureRequest) -> Path:
    """Each of them that torch wrote before 1.6."""
    path: Path = request.param
    return path


TALLY = pytest.StashKey[Counter[str]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`tally("kills")`, `tally("refused: bounds", 12)`: printed when all tests are done."""
    counter = request.config.stash[TALLY]
    campaign = request.path.stem.removeprefix("test_")

    def count(what: str, number: int = 1) -> None:
        counter[f"{campaign}: {what}"] += number

    return count


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Counter()


class Workers:
    """With pytest-xdist, what each worker counted is added up."""

    def pytest_testnodedown(self, node: Any) -> None:
        counts: dict[str, int] = getattr(node, "workeroutput", {}).get("tally", {})
        node.config.stash[TALLY].update(counts)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("dsession"):
        session.config.pluginmanager.register(Workers())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        counts = session.config.stash[TALLY]
        session.config.workeroutput["tally"] = dict(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = terminalreporter.config.stash[TALLY]
    if counts:
        terminalreporter.section("counted")
        for what, number in sorted(counts.items()):
            terminalreporter.line(f"{number:>10,}  {what}")

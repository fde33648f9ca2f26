"""Fixtures for every module: the checkpoints in `fixtures/`, one test each."""

from __future__ import annotations

from pathlib import Path

import pytest

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

"""What real processes saved in pieces, beside the whole of it; `fixtures/make_pieces.py` makes it.

The committed files are of four ranks; the slow tests make those of 2, 3, 4 and 6.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ckptfix
from tests.conftest import FIXTURES
from tests.dcp_folders import as_dicts, consolidated, same

if TYPE_CHECKING:
    from pathlib import Path

SLOW = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 3, 4, 6)]


@pytest.fixture(params=["committed", *SLOW], scope="module")
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the maker fills."""
    if request.param == "committed":
        return FIXTURES / "pieces"
    out = tmp_path_factory.mktemp("pieces")
    maker = FIXTURES / "make_pieces.py"
    command = [sys.executable, str(maker), str(out), "--ranks", str(request.param)]
    subprocess.run(command, check=True, timeout=300)
    return out


def whole(made: Path, name: str) -> Any:
    return torch.load(made / name, weights_only=False)


@pytest.mark.parametrize("folder", ["dcp", "local"])
def test_every_kind_of_tensor_is_whole_again(made: Path, folder: str) -> None:
    if (made / folder).is_dir():
        assert same(ckptfix.load(made / folder), whole(made, "whole.pt"))


def test_it_is_what_torch_makes_of_it(made: Path, tmp_path: Path) -> None:
    for folder in ("dcp", "fsdp2", "fsdp1_sharded_True"):
        theirs = consolidated(made / folder, tmp_path / "theirs.pt")
        assert same(as_dicts(ckptfix.load(made / folder)), as_dicts(theirs))


def test_strided_shards_of_dcp_are_boxes_as_any(made: Path) -> None:
    if (made / "strided").is_dir():
        assert same(ckptfix.load(made / "strided"), whole(made, "strided_whole.pt"))


def test_an_fsdp2_model_is_what_full_tensor_says(made: Path) -> None:
    found = ckptfix.load(made / "fsdp2")
    assert list(found) == ["model", "optimizer", "epoch"]
    assert same(dict(found["model"]), dict(whole(made, "fsdp2_whole.pt")))
    assert list(found["optimizer"]["state"]) == [
        key for key in found["model"] if "running" not in key and "tracked" not in key
    ]


@pytest.mark.parametrize("original", [True, False])
def test_an_fsdp1_model_is_its_full_state_dict(made: Path, original: bool) -> None:
    found = ckptfix.load(made / f"fsdp1_sharded_{original}")
    assert same(dict(found), dict(whole(made, "fsdp1_whole.pt")))

"""175 checkpoints from public repositories, by many versions of torch, where they are at hand.

They are strangers' files: torch may load them with `weights_only=True` only.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import ReadError
from ckptfix.tree import compare, walk
from ckptfix.tree.document import Document, Tensor
from tests.oracles import unlike

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file() and path.name != "README.md")

pytestmark = [
    pytest.mark.skipif(not FILES, reason="the corpus is not at hand"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:'torch.load' received a zip file"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


def opened(path: Path) -> Document | ReadError:
    try:
        return door.read(path)
    except ReadError as error:
        return error


OPENED = {path: opened(path) for path in FILES}


def named(path: Path) -> str:
    found = OPENED[path]
    how = found.container.replace(" ", "-") if isinstance(found, Document) else found.code
    return f"{how}-{path.relative_to(CORPUS)}"


def readable() -> list[Path]:
    return [path for path, found in OPENED.items() if isinstance(found, Document)]


def by_torch(path: Path) -> Any:
    """What torch makes of a file without trusting it; None where it refuses."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, safetensors.SafetensorError):
        return None


@pytest.mark.parametrize("path", readable(), ids=named)
def test_loading_gives_what_torch_gives_where_torch_can(path: Path):
    ours = ckptfix.load(path)
    theirs = by_torch(path)
    if theirs is None:
        assert compare.difference(door.read(path).root, door.read(path).root) is None
    elif path.suffix == ".safetensors":
        assert unlike({key: ours[key] for key in theirs}, theirs) is None
    else:
        assert unlike(plain(ours), plain(theirs)) is None


def plain(loaded: Any) -> Any:
    """Bare storages as lists: they have no bits to compare."""
    if isinstance(loaded, (tuple, list)):
        return [plain(value) for value in loaded]
    return list(loaded) if isinstance(loaded, torch.storage.TypedStorage) else loaded


@pytest.mark.parametrize("path", readable(), ids=named)
def test_writing_as_pt_keeps_everything(path: Path, tmp_path: Path):
    document = door.read(path)
    door.write(document, tmp_path / "out.pt")
    again = door.read(tmp_path / "out.pt")
    assert compare.difference(document.root, again.root) is None
    assert [data(tensor) for tensor in tensors(again)] == [data(t) for t in tensors(document)]
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None


def tensors(document: Document) -> list[Tensor]:
    return [node for _, node in walk.walk(document.root) if isinstance(node, Tensor)]


def data(tensor: Tensor) -> list[bytes]:
    return [span.read() for span in tensor.storage.spans]


@pytest.mark.parametrize("path", readable(), ids=named)
def test_what_is_written_loads_in_torch_as_the_original_does(path: Path, tmp_path: Path):
    theirs = by_torch(path)
    if theirs is None or path.suffix == ".safetensors":
        return
    door.write(door.read(path), tmp_path / "out.pt")
    for mmap in (False, True):
        again = torch.load(tmp_path / "out.pt", map_location="cpu", weights_only=True, mmap=mmap)
        assert unlike(plain(again), plain(theirs)) is None


@pytest.mark.parametrize("path", FILES, ids=named)
def test_looking_at_a_file_never_fails_but_by_an_error_of_ours(path: Path):
    found = OPENED[path]
    if isinstance(found, ReadError):
        assert str(found).startswith(str(path))
        return
    checkpoint = ckptfix.Checkpoint(found)
    assert all(finding.message for finding in checkpoint.findings)
    assert {type(state.path) for state in checkpoint.state_dicts} <= {str}


def test_nearly_all_of_the_corpus_opens():
    refused = {str(path): found for path, found in OPENED.items() if isinstance(found, ReadError)}
    assert len(refused) <= 0.05 * len(FILES), refused

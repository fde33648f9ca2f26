"""The table of formats: what each offers, in which order they are asked, and what lies in what."""

from __future__ import annotations

import gzip
import io
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptfix
from ckptfix.bytes.source import BytesSource
from ckptfix.errors import NotACheckpointError, UnsafeError
from ckptfix.formats import table
from ckptfix.formats.reading import Reading, Salvage

ROOT = Path(__file__).parents[2]
DATA = io.BytesIO()
torch.save({"w": torch.arange(3.0)}, DATA)


def module(name: str) -> Any:
    return import_module(f"ckptfix.formats.{name}")


@pytest.mark.parametrize("name", table.ORDER)
def test_a_format_has_the_names_of_all_others(name: str) -> None:
    offered = vars(module(name))
    assert isinstance(offered["NAME"], str)
    assert callable(offered["recognises"])
    wrapping = name in table.WRAPPINGS
    assert callable(offered.get("unpack")) == wrapping
    assert callable(offered.get("read")) != wrapping
    assert callable(offered.get("salvage")) != wrapping
    assert (ROOT / "docs" / "formats.md").read_text("utf-8").count(f"{name}.py")


@pytest.mark.parametrize("container", table.WRITABLE, ids=lambda container: container.name)
def test_what_is_written_is_read_under_the_same_name(container: table.Writable) -> None:
    assert container.module in table.ORDER
    assert container.name == module(container.module).NAME


def test_the_smallest_format_is_shown_as_it_is() -> None:
    shown = (ROOT / "docs" / "design.md").read_text("utf-8")
    assert (ROOT / "ckptfix" / "formats" / "tar.py").read_text("utf-8") in shown


def test_a_file_is_sniffed_once() -> None:
    source = Counting(DATA.getvalue())
    for name in table.ORDER:
        module(name).recognises(source)
    assert source.heads == 1


class Counting(BytesSource):
    heads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.heads += offset == 0 and length > 0
        return super().read(offset, length)


def packed_in_tar(name: str, data: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(DATA.getvalue()),
        packed_in_tar("a.pt", DATA.getvalue()),
        gzip.compress(packed_in_tar("a.pt", DATA.getvalue())),
    ],
    ids=["gzip", "tar", "tar.gz"],
)
@pytest.mark.parametrize("reading", [Reading, Salvage])
def test_what_lies_in_another_file_is_read(data: bytes, reading: type[Reading]) -> None:
    document = table.read(BytesSource(data, "x"), reading())
    assert document.container == "torch zip"
    assert document.root["w"].shape == (3,)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (gzip.compress(gzip.compress(DATA.getvalue())), UnsafeError),
        (packed_in_tar("b.tar", packed_in_tar("a.pt", DATA.getvalue())), NotACheckpointError),
        (gzip.compress(b'{"weight_map": {"a": "b.pt"}}'), NotACheckpointError),
    ],
    ids=["gzip in gzip", "tar in tar", "index in gzip"],
)
def test_nothing_nests_without_end(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        table.read(BytesSource(data, "x"), Reading())


def test_a_file_that_two_formats_could_read_is_the_first(tmp_path: Path) -> None:
    """A zip whose last bytes end as a text pickle does, and a tar whose first member is one."""
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    with (tmp_path / "a.pt").open("ab") as file:
        file.write(b"(lp0\n.")
    assert ckptfix.open(tmp_path / "a.pt").container == "torch zip"

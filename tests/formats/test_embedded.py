"""Checkpoints that an object keeps as bytes, as skorch pickles them."""

from __future__ import annotations

import io
import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptfix
from tests.oracles import ckptfix_command, done, unlike


class Net:
    """An object whose class is not there, as skorch pickles its own."""

    def __init__(self, **state: Any) -> None:
        self.__dict__ = state


def saved(value: Any, *, zipped: bool = True, device: bytes = b"cpu") -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue().replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00" + device)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("holder", [lambda data: {"a": [data]}, lambda data: Net(a=[data], b=3)])
def test_they_are_found_and_taken_out(holder: Any, zipped: bool):
    state = dict(nn.Linear(2, 3).state_dict())
    Path("in.pkl").write_bytes(pickle.dumps(holder(saved({"m": state}, zipped=zipped))))
    [finding] = [
        row for row in ckptfix.open("in.pkl").findings if row.code == "checkpoint-in-bytes"
    ]
    assert finding.where == "a/0"
    done(*shlex.split(str(finding.command))[1:])
    assert unlike(dict(ckptfix.load_state_dict("in.inner.pt")), state) is None
    for select in ("a/0", "a/0/m"):
        model = nn.Linear(2, 3)
        ckptfix.load_into(model, "in.pkl", select=select)
        assert unlike(dict(model.state_dict()), state) is None
    done("convert", "in.pkl", "out.safetensors", "--select", "a/0/m")
    assert unlike(dict(ckptfix.load_state_dict("out.safetensors")), state) is None


def test_nothing_says_that_every_storage_is_on_the_cpu_where_one_is_not():
    tagged = saved({"w": torch.ones(3)}, zipped=False, device=b"xla")
    Path("in.pkl").write_bytes(pickle.dumps({"epoch": 3, "cuda": tagged}))
    ran = ckptfix_command("to-cpu", "in.pkl", "out.pt")
    assert ran.returncode == 2
    assert (
        "keeps a checkpoint as bytes at 'cuda', with storages that are not on the CPU" in ran.stderr
    )
    assert not Path("out.pt").exists()
    hint = ran.stderr.splitlines()[1].partition("first: ")[2]
    done(*shlex.split(hint)[1:])
    done("to-cpu", "in.inner.pt", "out.pt")
    assert torch.equal(torch.load("out.pt")["w"], torch.ones(3))


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04", b"PK" + bytes(300), b"\x80\x02}q\x00.", b"\x80\x02"]
)
def test_other_bytes_are_bytes(data: bytes):
    Path("in.pkl").write_bytes(pickle.dumps({"w": torch.ones(2), "b": torch.ones(1), "x": data}))
    assert {row.code for row in ckptfix.open("in.pkl").findings} <= {
        "blocked-globals",
        "container-refused",
    }
    assert ckptfix_command("to-cpu", "in.pkl", "out.pt").returncode == 1

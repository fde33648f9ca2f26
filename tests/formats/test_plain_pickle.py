"""What `pickle.dump` makes of tensors and arrays, without a container."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptfix
from ckptfix import door
from ckptfix.errors import DamagedError, ReadError, UnsafeError
from ckptfix.limits import Limits

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def dump(path: Path, value: object, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_state_dict_reads_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    path = dump(tmp_path / "plain.pkl", net.state_dict(), protocol)
    found = ckptfix.load_state_dict(path, model=net)
    assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())
    assert door.read(path).container == "plain pickle"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("layout", "CF")
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i4", "i8", "u2", "b1", "c8"])
def test_arrays_are_tensors(tmp_path: Path, kind, layout, order) -> None:
    array = np.array([[0, 1, 2], [3, 4, 5]], dtype=kind)
    given = np.asarray(array.astype(np.dtype(kind).newbyteorder(order)), order=layout)
    for protocol in (0, 2, 4, 5):
        path = dump(tmp_path / "arrays.pkl", {"weight": given}, protocol)
        ckptfix.open(path).save(tmp_path / "out.safetensors", force=True)
        found = ckptfix.load_state_dict(tmp_path / "out.safetensors")["weight"]
        assert torch.equal(found, torch.from_numpy(array))


def test_a_scalar_of_numpy_is_a_value_not_a_weight(tmp_path: Path) -> None:
    path = dump(tmp_path / "mixed.pkl", {"lr": np.float64(0.1), "w": torch.ones(2)}, 2)
    (state,) = ckptfix.open(path).state_dicts
    assert list(state.tensors) == ["w"]


def test_it_converts_to_a_zip_that_loads_safely(tmp_path: Path) -> None:
    weights = OrderedDict(a=torch.arange(3.0), b=torch.ones(2, dtype=torch.bfloat16))
    ckptfix.open(dump(tmp_path / "plain.pkl", weights, 4)).save(tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_refused(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"w": torch.ones(2)}, protocol)
    for size in range(len(data)):
        (tmp_path / "cut.pkl").write_bytes(data[:size])
        with pytest.raises(ReadError):
            door.read(tmp_path / "cut.pkl")


@pytest.mark.parametrize("value", [7, 1.5, "text", b"bytes", None])
def test_one_value_and_bytes_of_no_pickle_are_no_checkpoint(tmp_path: Path, value: object) -> None:
    """As where the magic number of a legacy file is damaged: it must not be read as a number."""
    path = dump(tmp_path / "value.pkl", value, 2)
    door.read(path)
    path.write_bytes(path.read_bytes() + b"\x80\x02K\x01.")
    with pytest.raises(DamagedError, match="then 5 bytes that are not a pickle"):
        door.read(path)


def test_a_pickle_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path / "large.pkl", {"w": torch.ones(2)}, 2)
    with pytest.raises(UnsafeError, match=r"a pickle of \d+ bytes"):
        door.read(path, Limits(pickle_bytes=20))


def test_a_persistent_id_is_refused_where_nothing_holds_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "persistent.pkl"
    path.write_bytes(b"\x80\x02}X\x01\x00\x00\x00wX\x02\x00\x00\x00idQs.")
    with pytest.raises(UnsafeError, match="a pickle that has no container"):
        door.read(path)


def test_a_storage_without_bytes_is_an_object_that_is_carried_along(tmp_path: Path) -> None:
    path = tmp_path / "odd.pkl"
    path.write_bytes(b"\x80\x02ctorch.storage\n_load_from_bytes\nK\x01\x85R.")
    root = door.read(path).root
    assert (str(root.function), root.args) == ("torch.storage._load_from_bytes", (1,))


def test_what_a_storage_calls_as_it_is_loaded_is_found(tmp_path: Path) -> None:
    """The bytes of a storage are a checkpoint of their own, with a pickle of its own."""
    inner = io.BytesIO()
    torch.save(torch.ones(3).untyped_storage(), inner, _use_new_zipfile_serialization=False)
    call = b"cposix\nsystem\nX\x06\x00\x00\x00touch \x85R0"
    start = inner.getvalue().index(b"\x80\x02(X\x07\0\0\0storage")
    spoiled = inner.getvalue()[: start + 2] + call + inner.getvalue()[start + 2 :]
    path = tmp_path / "spoiled.pkl"
    data = b"B" + len(spoiled).to_bytes(4, "little") + spoiled
    path.write_bytes(b"\x80\x03ctorch.storage\n_load_from_bytes\n" + data + b"\x85R.")
    codes = {finding.code for finding in ckptfix.open(path).findings}
    assert "hidden-call" in codes

"""Which nodes are tensors, however they were pickled, and which of those are not dense."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import ckptfix
from ckptfix.errors import UnsupportedError
from tests.oracles import ckptfix_command, done, unlike

if TYPE_CHECKING:
    from pathlib import Path

T = torch.arange(6.0).view(2, 3)


class Made:
    """Pickled as a call and the state that its result is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


STATES = {
    "of 2017": (nn.Parameter, (T,), (True, False, None)),
    "that needs no gradient": (nn.Parameter, (T,), (False, False, None)),
    "with everything as its state": (nn.Parameter, (torch.zeros(0),), (T, 0, None, True, False)),
    "without a state": (nn.Parameter, (T,)),
}


@pytest.mark.parametrize("reduced", STATES.values(), ids=STATES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_parameter_is_the_tensor_in_it_however_it_was_pickled(
    tmp_path: Path, reduced: tuple[Any, ...], zipped: bool
):
    saved = tmp_path / "in.pt"
    made = {"w": Made(*reduced), "b": Made(*reduced)}
    torch.save(made, saved, _use_new_zipfile_serialization=zipped)
    wanted = {key: value.detach() for key, value in torch.load(saved, weights_only=False).items()}
    assert torch.equal(wanted["w"], T)
    done("convert", saved, tmp_path / "out.safetensors")
    assert unlike(dict(ckptfix.load_state_dict(tmp_path / "out.safetensors")), wanted) is None


@pytest.mark.parametrize("reduced", STATES.values(), ids=STATES)
def test_a_parameter_is_one_again_once_it_is_loaded(tmp_path: Path, reduced: tuple[Any, ...]):
    saved = tmp_path / "in.pt"
    torch.save({"w": Made(*reduced)}, saved)
    ours, theirs = (load(saved)["w"] for load in (ckptfix.load, unsafely))
    assert type(ours) is type(theirs) is nn.Parameter
    assert torch.equal(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad


def unsafely(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def test_a_parameter_of_a_plain_pickle_is_the_tensor_in_it(tmp_path: Path):
    saved = tmp_path / "in.pkl"
    saved.write_bytes(pickle.dumps({"w": Made(*STATES["of 2017"]), "b": T}))
    assert torch.equal(ckptfix.load_state_dict(saved)["w"], T)


SPECIAL = {
    "sparse": lambda: nn.Parameter(torch.eye(3).to_sparse()),
    "sparse CSR": lambda: nn.Parameter(torch.eye(3).to_sparse_csr()),
    "meta": lambda: nn.Parameter(torch.empty(2, device="meta")),
    "lazy": lambda: nn.LazyLinear(3).weight,
    "with a state of another kind": lambda: Made(nn.Parameter, (T,), (1, 2)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPECIAL)
def test_a_tensor_that_is_not_dense_is_refused_inside_a_parameter_too(tmp_path: Path, name: str):
    saved, out = tmp_path / "in.pt", tmp_path / "out.safetensors"
    torch.save({"w": SPECIAL[name](), "b": T, "c": T + 1}, saved)
    ran = ckptfix_command("convert", saved, out)
    assert ran.returncode == 2, ran.stderr
    assert "'w' is a " in ran.stderr
    assert not out.exists()
    if name == "lazy":  # torch gives it too; only a lazy module takes it
        assert is_lazy(ckptfix.load_state_dict(saved)["w"])
        return
    if name in ("meta", "with a state of another kind"):
        with pytest.raises(UnsupportedError, match="'w' "):
            ckptfix.load_state_dict(saved)
        return
    loaded = ckptfix.load_state_dict(saved)["w"]
    assert loaded.layout is not torch.strided
    assert torch.equal(loaded.to_dense(), torch.load(saved, weights_only=False)["w"].to_dense())


@pytest.mark.filterwarnings("ignore")
def test_what_a_quantized_module_packs_is_kept_or_refused(tmp_path: Path):
    saved = tmp_path / "in.pt"
    packed = (torch.quantize_per_tensor(T, 0.1, 0, torch.qint8), nn.Parameter(torch.ones(2)))
    state = {"scale": torch.tensor(0.5), "_packed_params": packed, "dtype": torch.qint8, "n": 3}
    torch.save({"model": state, "epoch": 3}, saved)
    done("convert", "--weights-only", saved, tmp_path / "out.pt")
    kept = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(kept) == ["scale", "_packed_params", "dtype"]
    assert torch.equal(kept["_packed_params"][0].int_repr(), packed[0].int_repr())
    assert kept["dtype"] is torch.qint8
    ran = ckptfix_command("convert", saved, tmp_path / "out.safetensors")
    assert ran.returncode == 2
    assert "'_packed_params' is a packed quantized weight" in ran.stderr

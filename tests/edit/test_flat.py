"""Flat parameters split by the shapes of a model, or of another checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptfix
from ckptfix.errors import CkptfixError, UnsupportedError
from tests.sharded import bits, ckptfix_command, done

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Block(nn.Module):
    """A layer, a norm with buffers, and a parameter that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor([2.0]))


class Net(nn.Module):
    """Blocks between two layers that may be one."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for number, tensor in enumerate(self.parameters()):
            nn.init.normal_(tensor, number)


def flat(
    model: nn.Module, units: Sequence[str] = ("",), before: str = "", wrapped: str = "_flat_param"
) -> dict[str, torch.Tensor]:
    """What FSDP1 saves of a model of which some modules are wrapped."""
    state: dict[str, torch.Tensor] = {}
    rest = dict(model.named_parameters())
    for unit in sorted(units, key=len, reverse=True):
        names = [name for name in rest if name.startswith(unit)]
        state[f"{before}{unit}{wrapped}"] = torch.cat(
            [rest.pop(n).detach().flatten() for n in names]
        )
    state |= {f"{before}{name}": tensor for name, tensor in model.named_buffers()}
    return state


def equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(
        found[key].shape == tensor.shape and bits(found[key]) == bits(tensor)
        for key, tensor in wanted.items()
    )


UNITS = [("",), ("", "blocks.0.", "blocks.1.", "blocks.2."), ("", "blocks.", "blocks.1.q.")]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_parameters_of_each_wrapped_module_are_the_models(
    tmp_path: Path, units: Sequence[str], tied: bool
) -> None:
    model = Net(tied=tied)
    torch.save(flat(model, units), tmp_path / "flat.pt")
    found = ckptfix.load_state_dict(tmp_path / "flat.pt", model=Net(tied=tied))
    assert equal(found, model.state_dict())
    other = Net(tied=tied)
    assert ckptfix.load_into(other, tmp_path / "flat.pt").loads
    assert equal(other.state_dict(), model.state_dict())
    assert not ckptfix.open(tmp_path / "flat.pt").check(other).loads


@pytest.mark.parametrize("wrapped", ["_flat_param", "flat_param"])
@pytest.mark.parametrize(
    "before", ["module.", "student.backbone.", "_fsdp_wrapped_module.", "model._orig_mod."]
)
def test_names_before_those_of_the_model_are_stripped(
    tmp_path: Path, before: str, wrapped: str
) -> None:
    model = Net()
    state = flat(model, UNITS[1], before, wrapped) | {"student.dino_head.w": torch.ones(2)}
    torch.save({"model": state, "epoch": 3}, tmp_path / "flat.pt")
    found = ckptfix.load_into(other := Net(), tmp_path / "flat.pt")
    assert found.loads
    assert equal(other.state_dict(), model.state_dict())


def test_names_that_the_file_lacks_are_added(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    model = Outer()
    torch.save(flat(model.net, UNITS[1]), tmp_path / "flat.pt")
    found = ckptfix.load_state_dict(tmp_path / "flat.pt", model=Outer())
    assert equal(found, model.state_dict())


def test_a_student_and_a_teacher_are_two_that_fit(tmp_path: Path) -> None:
    student, teacher = Net(), Net()
    state = flat(student, UNITS[1], "student.") | flat(teacher, UNITS[1], "teacher.")
    torch.save(state, tmp_path / "flat.pt")
    with pytest.raises(CkptfixError, match="fit Net in 2 ways") as caught:
        ckptfix.load_state_dict(tmp_path / "flat.pt", model=Net())
    assert caught.value.hint is not None
    torch.save(flat(student, UNITS[1], "student."), tmp_path / "one.pt")
    found = ckptfix.load_state_dict(tmp_path / "one.pt", model=Net())
    assert equal(found, student.state_dict())


def test_an_order_that_may_not_be_the_models_is_refused(tmp_path: Path) -> None:
    model = Net()
    torch.save(flat(model), tmp_path / "flat.pt")
    save_file(model.state_dict(), tmp_path / "like.safetensors")  # which sorts by name
    ran = ckptfix_command("fix", "flat.pt", "out.pt", "--like", "like.safetensors", cwd=tmp_path)
    assert ran.returncode == 2
    assert "like.safetensors has its keys sorted by name" in ran.stderr
    assert "hint: name the very model that was trained: ckptfix fix flat.pt" in ran.stderr
    assert not (tmp_path / "out.pt").exists()
    torch.save(model.state_dict(), tmp_path / "like.pt")
    done("fix", "flat.pt", "out.pt", "--like", "like.pt", cwd=tmp_path)
    assert equal(ckptfix.load(tmp_path / "out.pt"), model.state_dict())


def test_lengths_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    state = flat(Net(), UNITS[1])
    state["blocks.1._flat_param"] = state["blocks.1._flat_param"][:-1].clone()
    torch.save(state, tmp_path / "flat.pt")
    with pytest.raises(UnsupportedError, match="it has 48 elements, the parameters of Net there"):
        ckptfix.load_state_dict(tmp_path / "flat.pt", model=Net())


def padded(state: Mapping[str, torch.Tensor], step: int, end: int, fill: float) -> torch.Tensor:
    """A vector as torch 2.1 and later lay it out."""
    parts: list[torch.Tensor] = []
    for tensor in state.values():
        length = sum(len(part) for part in parts)
        parts += [torch.full((-length % step,), fill), tensor.detach().flatten()]
    length = sum(len(part) for part in parts)
    return torch.cat([*parts, torch.full((-length % end,), fill)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("fill", [42.0, 41.0])
def test_padding_is_told_by_what_is_in_it(
    tmp_path: Path, dtype: torch.dtype, step: int, fill: float
) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 5)
            self.two = nn.Linear(1, 7)

    model = Odd()
    named = dict(model.named_parameters())
    vector = padded(named, step, 6, fill).to(dtype)
    parts = {name: torch.zeros(2, dtype=dtype) for name in named}  # of one rank, as DCP has them
    torch.save({**parts, "_flat_param": vector}, tmp_path / "flat.pt")
    if fill == 42:
        found = ckptfix.load_state_dict(tmp_path / "flat.pt", model=Odd())
        assert equal(found, {name: tensor.to(dtype) for name, tensor in named.items()})
    else:
        with pytest.raises(UnsupportedError, match="cannot be split into parameters"):
            ckptfix.load_state_dict(tmp_path / "flat.pt", model=Odd())


def test_bytes_of_a_vector_are_held_against_their_checksum(tmp_path: Path) -> None:
    path = tmp_path / "flat.pt"
    state = flat(Net())
    torch.save(state, path)
    known = bits(state["_flat_param"])
    assert path.read_bytes().count(known) == 1
    changed = known[:-1] + bytes([known[-1] ^ 1])
    path.write_bytes(path.read_bytes().replace(known, changed))
    torch.save(Net().state_dict(), tmp_path / "like.pt")
    ran = ckptfix_command("fix", "flat.pt", "out.safetensors", "--like", "like.pt", cwd=tmp_path)
    assert ran.returncode == 2
    assert "checksum" in ran.stderr
    assert not (tmp_path / "out.safetensors").exists()

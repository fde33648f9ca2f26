"""Files by rank of tensor parallelism, joined by the shapes of a model or of another checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import CkptfixError
from tests.sharded import bits, ckptfix_command, done

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


class Attention(nn.Module):
    """As Llama has it, with fewer heads for keys and values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim // 2, bias=False)
        self.wo = nn.Linear(dim, dim)


class FeedForward(nn.Module):
    """As Llama has it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, 3 * dim, bias=False)
        self.w2 = nn.Linear(3 * dim, dim, bias=False)
        self.w3 = nn.Linear(dim, 3 * dim, bias=False)


class Layer(nn.Module):
    """One layer of two."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = Attention(dim)
        self.feed_forward = FeedForward(dim)
        self.norm = nn.LayerNorm(dim)


class Llama(nn.Module):
    """A small one. All biases are 0, as they are at first: equal in every file, slices or not."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(12, dim)
        self.layers = nn.ModuleList(Layer(dim) for _ in range(2))
        self.output = nn.Linear(dim, 12, bias=False)
        for name, tensor in self.named_parameters():
            nn.init.zeros_(tensor) if name.endswith("bias") else nn.init.normal_(tensor)


CUTS = {
    "wq.weight": 0, "wq.bias": 0, "wk.weight": 0, "w1.weight": 0, "w3.weight": 0,
    "output.weight": 0, "wo.weight": 1, "w2.weight": 1, "tok_embeddings.weight": 1,
}  # fmt: skip


def slices(
    state: Mapping[str, torch.Tensor], ranks: int, cuts: Mapping[str, int] = CUTS
) -> list[dict[str, torch.Tensor]]:
    """What each rank has of a state dict."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    for key, tensor in state.items():
        along = next((d for name, d in cuts.items() if key.endswith(name)), None)
        parts = [tensor] * ranks if along is None else tensor.chunk(ranks, along)
        for rank, part in zip(found, parts, strict=True):
            rank[key] = part.clone()
    return found


def write(folder: Path, parts: list[Any], name: str = "consolidated.{:02d}.pth") -> Path:
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(parts):
        torch.save(part, folder / name.format(rank))
    return folder / name.format(len(parts) - 1)


def equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[key].shape == tensor.shape and bits(found[key]) == bits(tensor)
        for key, tensor in wanted.items()
    )


DEEPSPEED = "mp_rank_{:02d}_model_states.pt"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["consolidated.{:02d}.pth", DEEPSPEED])
def test_slices_are_joined_as_the_model_has_them(tmp_path: Path, ranks: int, name: str) -> None:
    model = Llama()
    parts: list[Any] = slices(model.state_dict(), ranks)
    if name == DEEPSPEED:
        parts = [
            {"module": {f"module.{key}": t for key, t in part.items()}, "global_steps": 7,
             "mp_world_size": ranks, "rank": rank}
            for rank, part in enumerate(parts)
        ]  # fmt: skip
    path = write(tmp_path / "step", parts, name)
    torch.save(model.state_dict(), tmp_path / "like.pt")
    for given in (path, path.parent):
        assert equal(ckptfix.load_state_dict(given, model=Llama()), model.state_dict())
        assert ckptfix.load_into(other := Llama(), given).loads
        assert equal(other.state_dict(), model.state_dict())
        assert not ckptfix.open(given).check(model).loads
        assert "tensor-parallel" in [one.code for one in ckptfix.open(given).findings]
    ran = ckptfix_command("fix", path.parent, tmp_path / "out.safetensors", "--like", "like.pt",
                          cwd=tmp_path)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert equal(ckptfix.load(tmp_path / "out.safetensors"), model.state_dict())
    said = " ".join((ran.stderr + ran.stdout).split())
    assert "joined along dimension 0" in said
    assert "joined along dimension 1" in said
    assert "the same in all" in said


def refused(tmp_path: Path, given: Path, code: str, match: str, model: nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "like.pt")
    with pytest.raises(CkptfixError, match=match) as caught:
        ckptfix.load_state_dict(given, model=model)
    assert caught.value.code == code
    out = tmp_path / "out.pt"
    ran = ckptfix_command("fix", given, out, "--like", tmp_path / "like.pt")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\nhint: ") == 1
    assert not out.exists()


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    model = Llama()
    parts = slices(model.state_dict(), 2)
    parts[1]["layers.1.norm.weight"][3] += 1
    path = write(tmp_path / "step", parts)
    what = r"layers.1.norm.weight cannot be joined: it is whole in consolidated.00.pth and cons"
    refused(tmp_path, path, "tensor-parallel", what, model)


def test_a_rank_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = Llama()
    path = write(tmp_path / "step", slices(model.state_dict(), 4))
    (path.parent / "consolidated.01.pth").unlink()
    refused(tmp_path, path, "piece-missing", "files of 1 of 4 ranks are not there: 1", model)
    path.unlink()
    what = "its slices .* do not add up to"
    refused(tmp_path, path.parent, "piece-missing", "files of 1 of 3 ranks", model)
    write(tmp_path / "two", slices(model.state_dict(), 4)[:2])
    refused(tmp_path, tmp_path / "two", "tensor-parallel", what, model)
    parts = [{"module": one, "mp_world_size": 4} for one in slices(model.state_dict(), 4)[:2]]
    path = write(tmp_path / "three", parts, DEEPSPEED)
    refused(tmp_path, path, "piece-missing", "files of 2 of 4 ranks are not there: 2, 3", model)


def test_a_rank_twice_is_refused(tmp_path: Path) -> None:
    model = Llama()
    path = write(tmp_path / "step", slices(model.state_dict(), 2))
    (path.parent / "consolidated.1.pth").write_bytes(path.read_bytes())
    refused(tmp_path, path, "unsafe", "two files are of one rank", model)


def test_files_of_different_steps_are_refused(tmp_path: Path) -> None:
    model = Llama()
    parts: list[Any] = [
        {"module": part, "global_steps": 7 + rank}
        for rank, part in enumerate(slices(model.state_dict(), 2))
    ]
    path = write(tmp_path / "step", parts, DEEPSPEED)
    what = "global_steps is 7 in mp_rank_00_model_states.pt, and 8 in mp_rank_01_model_states.pt"
    refused(tmp_path, path, "ranks-differ", what, model)


def test_keys_and_values_that_several_ranks_share_do_not_add_up(tmp_path: Path) -> None:
    model = Llama()
    key = "layers.0.attention.wk.weight"
    parts = slices(model.state_dict(), 4)
    halves = model.state_dict()[key].chunk(2)
    for rank, part in enumerate(parts):
        part[key] = halves[rank // 2].clone()
    path = write(tmp_path / "step", parts)
    what = f"{key} cannot be joined: its slices .* do not add up"
    refused(tmp_path, path, "tensor-parallel", what, model)


class Fused(nn.Module):
    """Layers that are several in one, by their names or by their sizes."""

    def __init__(self, make: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.block = nn.Module()
        make(self.block)


def qkv(block: nn.Module) -> None:
    block.query_key_value = nn.Linear(8, 24)
    block.dense = nn.Linear(8, 8)


def nameless(block: nn.Module) -> None:
    block.attn_in = nn.Linear(8, 24)
    block.attn_out = nn.Linear(8, 8)


def gated(block: nn.Module) -> None:
    block.dense_h_to_4h = nn.Linear(8, 32, bias=False)
    block.dense_4h_to_h = nn.Linear(16, 8, bias=False)


def turned(block: nn.Module) -> None:
    block.gate_up_proj = nn.Parameter(torch.randn(8, 32))
    block.down_proj = nn.Parameter(torch.randn(16, 8))


@pytest.mark.parametrize(
    ("make", "cuts", "key"),
    [
        (qkv, {"query_key_value.weight": 0, "query_key_value.bias": 0, "dense.weight": 1}, "query"),
        (nameless, {"attn_in.weight": 0, "attn_in.bias": 0, "attn_out.weight": 1}, "attn_in"),
        (gated, {"dense_h_to_4h.weight": 0, "dense_4h_to_h.weight": 1}, "dense_h_to_4h"),
        (turned, {"gate_up_proj": 1, "down_proj": 0}, "gate_up_proj"),
    ],
)
def test_what_may_be_several_in_one_is_refused(
    tmp_path: Path, make: Callable[[nn.Module], None], cuts: dict[str, int], key: str
) -> None:
    model = Fused(make)
    path = write(tmp_path / "step", slices(model.state_dict(), 2, cuts))
    what = rf"block.{key}\S* cannot be joined: .* and slices of each may lie side by side"
    refused(tmp_path, path, "tensor-parallel", what, model)


def test_what_one_rank_alone_has_is_taken(tmp_path: Path) -> None:
    model = Llama()
    parts = slices(model.state_dict(), 2)
    del parts[0]["layers.1.feed_forward.w1.weight"]
    parts[1]["layers.1.feed_forward.w1.weight"] = model.state_dict()[
        "layers.1.feed_forward.w1.weight"
    ]
    path = write(tmp_path / "step", parts)
    found = ckptfix.load_state_dict(path, model=Llama())
    assert set(found) == set(model.state_dict())
    assert equal({key: found[key] for key in model.state_dict()}, model.state_dict())


def test_without_a_target_they_are_what_they_are(tmp_path: Path) -> None:
    parts = slices(Llama().state_dict(), 2)
    path = write(tmp_path / "step", parts)
    ran = ckptfix_command("convert", path, tmp_path / "one.pt")
    assert ran.returncode == 0
    assert "one of 2 files of tensor parallelism: OUT has its slices" in ran.stderr
    assert equal(torch.load(tmp_path / "one.pt"), parts[1])
    assert equal(ckptfix.load(path), parts[1])
    for verb in ("convert", "fix", "strip-prefix"):
        ran = ckptfix_command(verb, path.parent, tmp_path / "all.pt")
        assert ran.returncode in (1, 2)
        assert not (tmp_path / "all.pt").exists()
    assert (
        "slices of 2 ranks of tensor parallelism"
        in ckptfix_command("convert", path.parent, tmp_path / "all.pt").stderr
    )
    for reads in (ckptfix.load, ckptfix.load_state_dict):
        with pytest.raises(CkptfixError, match="slices of 2 ranks"):
            reads(path.parent)
    with pytest.raises(CkptfixError, match="slices of 2 ranks"):
        ckptfix.diff(path.parent, path)
    assert "tensor-parallel" in done("inspect", path.parent)


def test_one_file_alone_is_a_file(tmp_path: Path) -> None:
    state = dict(Llama().state_dict())
    path = write(tmp_path / "one", [state])
    assert ckptfix.open(path).findings == []
    assert equal(ckptfix.load_state_dict(path, model=Llama()), state)


def test_the_training_state_of_one_rank_is_not_that_of_all(tmp_path: Path) -> None:
    model = Llama()
    parts = [{"module": part, "optimizer": {}} for part in slices(model.state_dict(), 2)]
    path = write(tmp_path / "step", parts, DEEPSPEED)
    torch.save(model.state_dict(), tmp_path / "like.pt")
    out = tmp_path / "out.pt"
    ran = ckptfix_command("fix", path, out, "--like", tmp_path / "like.pt", "--keep-training-state")
    assert ran.returncode == 2
    assert "hint: leave out --keep-training-state" in ran.stderr


def test_bytes_of_slices_are_held_against_their_checksum(tmp_path: Path) -> None:
    model = Llama()
    path = write(tmp_path / "step", slices(model.state_dict(), 2))
    known = bits(slices(model.state_dict(), 2)[1]["output.weight"])
    changed = known[:-1] + bytes([known[-1] ^ 1])
    path.write_bytes(path.read_bytes().replace(known, changed))
    torch.save(model.state_dict(), tmp_path / "like.pt")
    for out in ("out.pt", "out.safetensors"):
        ran = ckptfix_command("fix", path.parent, tmp_path / out, "--like", tmp_path / "like.pt")
        assert ran.returncode == 2
        assert "checksum" in ran.stderr
        assert not (tmp_path / out).exists()


def test_a_folder_is_not_taken_for_its_first_file(tmp_path: Path) -> None:
    path = write(tmp_path / "step", slices(Llama().state_dict(), 2))
    for arguments in (("recover", path.parent, tmp_path / "out.pt"),
                      ("check", path.parent, "--read-data")):  # fmt: skip
        ran = ckptfix_command(*arguments)
        assert ran.returncode == 2
        assert "holds the slices of 2 ranks" in ran.stderr
        assert ran.stderr.count("\nhint: ") == 1
    path.write_bytes(path.read_bytes()[:3000])
    ran = ckptfix_command("check", path.parent)
    assert ran.returncode == 1
    assert "damaged" in ran.stdout

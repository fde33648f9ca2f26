"""Models with and without memory, filled from files; torch's own loading is the oracle."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import ckptfix
from ckptfix import loaders
from ckptfix.errors import CkptfixError, KeyMismatchError
from ckptfix.torch_bridge import filling
from tests.oracles import unlike

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Tied(nn.Module):
    """A model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.embed(tokens))
        return made


class Rotary(nn.Module):
    """A model with a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


class Strict(nn.Linear):
    """A model whose own `load_state_dict` knows nothing of assigning."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        return super().load_state_dict(state_dict, strict)


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))


MODELS: list[Callable[[], Any]] = [
    lambda: nn.Linear(3, 2),
    convolutions,
    parametrized,
    Tied,
    lambda: nn.LSTM(3, 4, num_layers=2),
    lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    lambda: nn.DataParallel(convolutions()),
    lambda: torch.compile(nn.Linear(3, 2), backend="eager"),
    lambda: Strict(3, 2),
]


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_a_model_on_meta_gets_its_tensors(make: Any, mmap: bool, tmp_path: Path) -> None:
    source, model = make(), on_meta(make)
    path = saved(source.state_dict(), tmp_path / "in.pt")
    report = ckptfix.load_into(model, path, mmap=mmap)
    assert report.loads
    assert report.on_meta == []
    assert report.assigned == len({id(t) for t in source.state_dict(keep_vars=True).values()})
    assert unlike(dict(model.state_dict()), dict(source.state_dict())) is None
    assert [type(p) for p in model.parameters()] == [type(p) for p in source.parameters()]


def test_a_recurrent_network_runs_on_what_it_was_given(tmp_path: Path) -> None:
    source, model = nn.LSTM(3, 4), on_meta(lambda: nn.LSTM(3, 4))
    ckptfix.load_into(model, saved(source.state_dict(), tmp_path / "in.pt"))
    given = torch.rand(2, 1, 3)
    assert torch.equal(source(given)[0], model(given)[0])


def test_ties_of_a_model_on_meta_are_kept(tmp_path: Path) -> None:
    source, model = Tied(), on_meta(Tied)
    for state in (source.state_dict(), {"embed.weight": source.embed.weight.detach()}):
        path = saved(state, tmp_path / "in.pt")
        model = on_meta(Tied)
        ckptfix.load_into(model, path)
        assert isinstance(model, Tied)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, source.embed.weight)


def test_what_is_one_tensor_in_the_file_alone_becomes_two(tmp_path: Path) -> None:
    shared = torch.rand(2, 2)
    path = saved({"0.weight": shared, "1.weight": shared}, tmp_path / "in.pt")
    model = on_meta(lambda: nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2))))
    ckptfix.load_into(model, path)
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    assert torch.equal(model.get_parameter("1.weight"), shared)


def test_parts_of_one_storage_are_not_copied_where_they_do_not_overlap(tmp_path: Path) -> None:
    whole = torch.rand(8)
    path = saved(
        {"0.weight": whole[:4].view(2, 2), "1.weight": whole[4:].view(2, 2)}, tmp_path / "a"
    )
    model = on_meta(lambda: nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2))))
    ckptfix.load_into(model, path)
    first, second = (model.get_parameter(f"{n}.weight") for n in range(2))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(second.flatten(), whole[4:])


def test_dtypes_gradients_and_marks_are_those_of_the_model(tmp_path: Path) -> None:
    source = nn.Linear(3, 2).half()
    model = on_meta(lambda: nn.Linear(3, 2, dtype=torch.bfloat16))
    model.get_parameter("bias").requires_grad_(False)
    model.get_parameter("weight").is_sharded = True  # type: ignore[attr-defined]
    report = ckptfix.load_into(model, saved(source.state_dict(), tmp_path / "in.pt"))
    weight, bias = model.get_parameter("weight"), model.get_parameter("bias")
    assert (weight.dtype, weight.requires_grad, bias.requires_grad) == (torch.bfloat16, True, False)
    assert torch.equal(weight, source.weight.to(torch.bfloat16))
    assert vars(weight) == {"is_sharded": True}
    assert len(report.dtype_difference) == 2


def test_strides_are_those_of_the_model(tmp_path: Path) -> None:
    weight = torch.rand(3, 2)
    path = saved({"weight": weight.t(), "bias": torch.rand(2)}, tmp_path / "in.pt")
    model = on_meta(lambda: nn.Linear(3, 2))
    ckptfix.load_into(model, path)
    assert model.get_parameter("weight").is_contiguous()
    assert torch.equal(model.get_parameter("weight"), weight.t())


def test_a_parameter_that_was_saved_for_a_buffer_stays_a_buffer(tmp_path: Path) -> None:
    source, model = nn.BatchNorm1d(2), on_meta(lambda: nn.BatchNorm1d(2))
    state = source.state_dict()
    state["running_mean"] = nn.Parameter(torch.tensor([3.0, 4.0]))
    ckptfix.load_into(model, saved(state, tmp_path / "in.pt"))
    assert [name for name, _ in model.named_parameters()] == ["weight", "bias"]
    assert dict(model.named_buffers())["running_mean"].tolist() == [3.0, 4.0]


def test_parts_on_meta_are_given_and_the_others_stay_what_they_are(tmp_path: Path) -> None:
    source, model = convolutions(), convolutions()
    model.get_submodule("2").to("meta")
    kept = model.get_parameter("0.weight")
    address = kept.data_ptr()
    report = ckptfix.load_into(model, saved(source.state_dict(), tmp_path / "in.pt"))
    assert report.assigned == 2
    assert model.get_parameter("0.weight") is kept
    assert kept.data_ptr() == address
    assert unlike(dict(model.state_dict()), dict(source.state_dict())) is None


def test_buffers_that_no_file_holds_are_named_as_still_on_meta(tmp_path: Path) -> None:
    path = saved(Rotary().state_dict(), tmp_path / "in.pt")
    with pytest.warns(UserWarning, match="inv_freq is still on the meta device"):
        report = ckptfix.load_into(on_meta(Rotary), path)
    assert (report.loads, report.assigned, report.on_meta) == (True, 2, ["inv_freq"])


def test_what_is_missing_stays_on_meta_and_is_named(tmp_path: Path) -> None:
    path = saved({"weight": torch.ones(2, 2)}, tmp_path / "in.pt")
    model = on_meta(lambda: nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="bias is still on the meta device"):
        report = ckptfix.load_into(model, path, strict=False)
    assert (report.assigned, report.missing, report.on_meta) == (1, ["bias"], ["bias"])
    assert model.get_parameter("weight").tolist() == [[1, 1], [1, 1]]


def test_map_location_says_where_what_was_on_meta_goes(tmp_path: Path) -> None:
    path = saved(nn.Linear(2, 2).state_dict(), tmp_path / "in.pt")
    seen = []

    def place(storage: torch.UntypedStorage, tag: str) -> torch.UntypedStorage:
        seen.append(tag)
        return storage

    ckptfix.load_into(on_meta(lambda: nn.Linear(2, 2)), path, map_location=place)
    assert seen == ["cpu", "cpu"]
    with pytest.warns(UserWarning, match="weight, bias are still on the meta device"):
        ckptfix.load_into(on_meta(lambda: nn.Linear(2, 2)), path, map_location="meta")


class Fragile(nn.Linear):
    """A model whose loader ends in an error, once everything else is loaded."""

    def set_extra_state(self, state: Any) -> None:
        if self.weight.device.type != "meta":
            raise ValueError("no such state")

    def get_extra_state(self) -> Any:
        return torch.ones(1)


def test_a_model_on_meta_is_as_it_was_where_loading_raises(tmp_path: Path) -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Fragile(2, 2)))
    before = dict(model.named_parameters())
    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    state["1._extra_state"] = torch.ones(1)
    path = saved(state, tmp_path / "in.pt")
    with pytest.raises(KeyMismatchError, match="no such state"):
        ckptfix.load_into(model, path)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)


# --- models that are large


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "STAGED", 0)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("make", MODELS)
def test_a_large_model_gets_the_same(make: Any, tmp_path: Path) -> None:
    source, model = make(), make()
    before = list(model.parameters())
    report = ckptfix.load_into(model, saved(source.state_dict(), tmp_path / "in.pt"), verify=True)
    assert (report.loads, report.assigned) == (True, 0)
    assert unlike(dict(model.state_dict()), dict(source.state_dict())) is None
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_file_that_ends_early_is_an_error_that_says_what_became_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({f"{n}.weight": torch.ones(64, 64) for n in range(4)}, tmp_path / "in.pt")
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    pour = filling.pour

    def cut_short(*given: Any) -> None:
        with path.open("r+b") as file:
            file.truncate(30_000)
        pour(*given)

    monkeypatch.setattr(filling, "pour", cut_short)
    with pytest.raises(CkptfixError, match="the model has a part of it now"):
        ckptfix.load_into(model, path)


GROWTH = """
import sys, threading, torch, ckptfix, ckptfix.loaders
from torch import nn
ckptfix.loaders.STAGED = 1 << 20
def anonymous():
    lines = open('/proc/self/status').read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) // 1024
path, device = sys.argv[1:]
ckptfix.load_into(nn.Linear(1, 1), path + '.small')
with torch.device(device):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
before, peak, ended = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
ckptfix.load_into(model, path)
ended.set()
watcher.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("device", "most"), [("meta", 256 + 64), ("cpu", 64)])
def test_a_large_model_is_loaded_without_a_second_copy(
    device: str, most: int, tmp_path: Path
) -> None:
    path = tmp_path / "in.pt"
    saved(nn.Linear(1, 1).state_dict(), tmp_path / "in.pt.small")
    saved({f"{n}.weight": torch.zeros(2048, 2048) for n in range(16)}, path)
    command = [sys.executable, "-c", GROWTH, str(path), device]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    path.unlink()
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < most

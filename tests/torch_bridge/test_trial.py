"""A model is asked what it takes: all that it holds comes back, and what it took is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix
from ckptfix.errors import CkptfixError
from ckptfix.words import plural
from tests.oracles import code_of, module_in, unlike

if TYPE_CHECKING:
    from types import ModuleType

MODELS = '''
import torch
from torch import nn


class Statistics(nn.Module):
    """Has no key of its own until it is loaded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)
        self.register_buffer("std", None)

    def _load_from_state_dict(self, state, prefix, *others):
        for name in ("mean", "std"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name]))
        super()._load_from_state_dict(state, prefix, *others)


class Codebooks(nn.Module):
    """A list that grows."""

    def __init__(self):
        super().__init__()
        self.books = nn.ModuleList()

    def _load_from_state_dict(self, state, prefix, *others):
        for key in state:
            if key.startswith(prefix + "books."):
                self.books.append(nn.Embedding(*state[key].shape))
        super()._load_from_state_dict(state, prefix, *others)


class Pops(nn.Module):
    """Keeps what it takes as an attribute."""

    scale = None

    def _load_from_state_dict(self, state, prefix, *others):
        self.scale = state.pop(prefix + "scale")


class Own(nn.Module):
    """What people write, who copy what they find."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def load_state_dict(self, state, strict=True):
        own = self.state_dict()
        for key, value in state.items():
            if key in own:
                own[key].data.copy_(value.data)


class Nothing(Own):
    def load_state_dict(self, state, strict=True):
        pass


class Deaf(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def _load_from_state_dict(self, *others):
        pass


class Forgiving(nn.Module):
    """Has nothing, and takes everything."""

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)
'''


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODELS)
    return module_in(Path("net.py"), "trial_models")


GROW = {
    "Statistics": {"mean": torch.arange(3.0), "std": torch.ones(3)},
    "Codebooks": {"books.0.weight": torch.rand(4, 2), "books.1.weight": torch.rand(5, 2)},
    "Pops": {"scale": torch.arange(4.0)},
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", GROW)
def test_a_model_without_keys_that_takes_the_file_gets_all_of_it(
    models: ModuleType, name: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({prefix + key: value for key, value in GROW[name].items()}, "in.pt")
    reference = f"net.py:{name}"
    assert code_of("check", "in.pt", "--model", reference) == (1 if prefix else 0)
    code_of("fix", "in.pt", "out.pt", "--model", reference)
    if prefix:
        assert f"{plural(len(GROW[name]), 'key')} renamed" in capsys.readouterr().out
    state = torch.load("out.pt" if prefix else "in.pt")
    assert unlike(dict(state), GROW[name]) is None
    made = getattr(models, name)()
    report = ckptfix.load_into(made, "in.pt")
    assert report.loads
    assert sorted(report.matched) == sorted(GROW[name])
    found = {"scale": made.scale} if name == "Pops" else dict(made.state_dict())
    assert unlike(found, GROW[name]) is None
    fresh = getattr(models, name)()
    fresh.load_state_dict(ckptfix.load_state_dict("in.pt", model=fresh))


@pytest.mark.parametrize(
    "name", ["net.py:Nothing", "net.py:Deaf", "net.py:Forgiving", "torch.nn:ReLU"]
)
def test_a_model_that_takes_nothing_of_a_file_is_no_success(models: ModuleType, name: str) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), "in.pt")
    assert code_of("check", "in.pt", "--model", name) == 1
    for out in ("out.pt", "out.safetensors"):
        assert code_of("fix", "in.pt", out, "--model", name) == 2
        assert not Path(out).exists()
    make = nn.ReLU if name.startswith("torch") else getattr(models, name.partition(":")[2])
    for strict in (True, False):
        with pytest.raises(CkptfixError):
            ckptfix.load_into(make(), "in.pt", strict=strict)
        with pytest.raises(CkptfixError):
            ckptfix.load_state_dict("in.pt", model=make(), strict=strict)


def test_what_an_own_loader_passes_over_is_named(
    models: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}, "in.pt")
    report = ckptfix.load_into(models.Own(), "in.pt")
    assert report.matched == ["a.weight", "a.bias"]
    assert report.forgiven == ["b.weight", "b.bias"]
    assert report.share == 0.5
    assert code_of("check", "in.pt", "--model", "net.py:Own") == 0
    assert "6 of 12 elements stay at random: the model's own" in capsys.readouterr().out


class Traces(nn.Module):
    """Code that leaves traces in what the model holds, of its own and by a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.seen: list[str] = []
        self.counts: dict[str, Any] = {"calls": {"n": 0}, "names": set()}
        self.hidden = [nn.Linear(3, 3)]
        self.scale = torch.ones(3)
        self._register_load_state_dict_pre_hook(lambda state, prefix, *_: self.note(state, prefix))

    def note(self, state: dict[str, Any], prefix: str) -> None:
        self.seen.append(prefix)
        self.counts["calls"]["n"] += 1
        self.counts["names"].update(state)
        self.counts["new"] = torch.rand(2)
        self.scale.zero_()
        with torch.no_grad():
            self.hidden[0].weight.copy_(state[prefix + "a.weight"])


def test_a_model_that_is_asked_keeps_no_trace_of_it() -> None:
    model = Traces()
    torch.save(Traces().state_dict(), "in.pt")
    weight = model.hidden[0].weight
    before = weight.detach().clone()
    seen, calls = model.seen, model.counts["calls"]
    state = torch.random.get_rng_state()
    ckptfix.load_state_dict("in.pt", model=model)
    ckptfix.check(model, "in.pt")
    assert torch.random.get_rng_state().equal(state)
    assert model.seen is seen
    assert model.counts["calls"] is calls
    assert (seen, model.counts) == ([], {"calls": {"n": 0}, "names": set()})
    assert model.hidden[0].weight is weight
    assert weight.equal(before)
    assert model.scale.equal(torch.ones(3))


@pytest.mark.parametrize("pattern", ["*", "[wb]*"])
def test_to_drop_all_is_refused_by_every_door(pattern: str) -> None:
    torch.save({"model": nn.Linear(2, 2).state_dict(), "epoch": 1}, "in.pt")
    for model in ([], ["--model", "torch.nn:ReLU"]):
        for out in ("out.pt", "out.safetensors"):
            assert code_of("fix", "in.pt", out, "--drop", pattern, *model) == 2
            assert not Path(out).exists()
    for wanted in (None, nn.ReLU()):
        with pytest.raises(CkptfixError, match="nothing would be left"):
            ckptfix.load_state_dict("in.pt", model=wanted, drop=pattern)


class Plainly(nn.Linear):
    """An override that knows no options."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"w": self.weight.detach()}

    def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
        self.weight.data = state["w"]


def test_a_model_whose_own_state_dict_takes_no_options() -> None:
    torch.save({"w": torch.ones(2, 2)}, "in.pt")
    model = Plainly(2, 2)
    assert ckptfix.check(model, "in.pt").loads
    weight = model.weight.detach().clone()
    assert weight.equal(model.weight)
    ckptfix.load_into(model, "in.pt")
    assert model.weight.equal(torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_is_judged_by_its_keys() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    torch.save(model.state_dict(), "in.pt")
    assert ckptfix.check(model, "in.pt").loads
    assert ckptfix.load_into(model, "in.pt").loads

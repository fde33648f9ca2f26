"""Averages of weights taken instead of the weights, wherever a program keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckptfix
from ckptfix.errors import SelectionError
from tests.oracles import ckptfix_command, done, unlike


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n"
        "def Net(): return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))\n"
    )


def net(value: float) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for tensor in made.state_dict().values():
        tensor.fill_(value)
    return made


PLAIN, AVERAGE = net(1.0).state_dict(), net(2.0).state_dict()
PARAMETERS = [key for key, _ in net(1.0).named_parameters()]


def _with(start: str, state: dict[str, Any], dot: str = ".") -> dict[str, Any]:
    return {start + key.replace(".", dot): value for key, value in state.items()}


def _parameters(dot: str, start: str) -> dict[str, Any]:
    return _with(start, {key: AVERAGE[key] for key in PARAMETERS}, dot)


def _averaged() -> dict[str, Any]:
    return AveragedModel(net(2.0)).state_dict()


LAYOUTS: dict[str, Any] = {
    "beside": {"state_dict": PLAIN, "state_dict_ema": AVERAGE},
    "BasicSR": {"params": PLAIN, "params_ema": AVERAGE},
    "SWA callback": {
        "state_dict": _with("model.", PLAIN),
        "callbacks": {"StochasticWeightAveraging": {"average_model_state": _averaged()}},
    },
    "WeightAveraging callback": {
        "state_dict": _with("model.", AVERAGE),
        "current_model_state": _with("model.", PLAIN),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "mmengine": {"state_dict": PLAIN, "ema_state_dict": {**_with("module.", AVERAGE), "steps": 7}},
    "part of one": {**_with("model.", PLAIN), **_with("ema_model.", AVERAGE)},
    "part of a part": {
        "state_dict": {**_with("net.online.", PLAIN), **_with("net.ema_model.", AVERAGE)}
    },
    "ema_pytorch": {
        "model": PLAIN,
        "ema": {
            **_with("online_model.", PLAIN),
            **_with("ema_model.", AVERAGE),
            "initted": torch.tensor(True),
            "step": torch.tensor(9),
        },
    },
    "a hyphen": {"model": PLAIN, "model-ema": AVERAGE},
    "one word": {"model": PLAIN, "modelEMA": AVERAGE},
    "avg": {"model": PLAIN, "avg": AVERAGE},
    "Polyak": {"model": PLAIN, "polyak": AVERAGE},
    "BYOL": {"online_network_state_dict": PLAIN, "target_network_state_dict": AVERAGE},
    "EMA callback": {"state_dict": PLAIN, "callbacks": {"EMA{'decay': 0.9}": {"model": AVERAGE}}},
    "in a wrapper": {**_with("model.", PLAIN), **_with("model_ema.module.", AVERAGE)},
    "in a wrapper, counted": {
        **PLAIN,
        **_with("averaged_model.module.", AVERAGE),
        "averaged_model.n_averaged": torch.tensor(3),
    },
    "only the averages in ema": {
        "model": PLAIN,
        "ema": {**_with("ema_model.", AVERAGE), "step": torch.tensor(9)},
    },
}


@pytest.mark.filterwarnings("ignore:in.pt. left out")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("verb", ["fix", "load_state_dict", "load_into"])
def test_the_plain_one_is_taken_and_the_other_offered(layout: dict[str, Any], verb: str):
    torch.save(layout, "in.pt")
    for wanted, average in ((PLAIN, False), (AVERAGE, True)):
        if verb == "fix":
            options = ("--model", "net.py:Net", "--force", *(["--average"] if average else []))
            done("fix", "in.pt", "out.pt", *options)
            found: Any = torch.load("out.pt")
        elif verb == "load_state_dict":
            found = ckptfix.load_state_dict("in.pt", model=net(0.0), average=average)
        else:
            model = net(0.0)
            ckptfix.load_into(model, "in.pt", average=average)
            found = model.state_dict()
        assert unlike(dict(found), dict(wanted)) is None


FLATTENED = {
    "mmcv": {**PLAIN, **_parameters("_", "ema_")},
    "behind": {**PLAIN, **{f"{key}_ema": AVERAGE[key] for key in PARAMETERS}},
    "latent diffusion": {
        **_with("model.", PLAIN),
        **_parameters("", "model_ema."),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3),
    },
}


@pytest.mark.parametrize("layout", FLATTENED.values(), ids=FLATTENED)
@pytest.mark.parametrize("nested", [True, False])
def test_averages_of_parameters_alone_stand_beside_the_buffers(layout: Any, nested: bool):
    torch.save({"state_dict": layout, "epoch": 3} if nested else layout, "in.pt")
    wanted = {key: AVERAGE[key] if key in PARAMETERS else PLAIN[key] for key in PLAIN}
    assert "averaged-copy" in done("fix", "in.pt", "plain.pt", "--model", "net.py:Net")
    assert unlike(dict(torch.load("plain.pt")), dict(PLAIN)) is None
    done("fix", "in.pt", "out.pt", "--model", "net.py:Net", "--average")
    assert unlike(dict(torch.load("out.pt")), wanted) is None
    model = net(0.0)
    ckptfix.load_into(model, "in.pt", average=True)
    assert unlike(dict(model.state_dict()), wanted) is None


def test_without_a_model_the_averages_alone_are_written():
    torch.save({"params": PLAIN, "params_ema": AVERAGE, "epoch": 3}, "in.pt")
    for out in ("out.pt", "out.safetensors"):
        done("convert", "in.pt", out, "--average")
        assert unlike(dict(ckptfix.load_state_dict(out)), dict(AVERAGE)) is None
    ran = ckptfix_command("convert", "in.pt", "plain.safetensors")
    assert "averages are not taken: params_ema; --average takes them" in ran.stderr
    assert unlike(dict(ckptfix.load_state_dict("plain.safetensors")), dict(PLAIN)) is None
    assert list(ckptfix.open("in.pt").average().state_dicts[0].mapping) == list(AVERAGE)


def test_check_holds_the_averages_against_a_model():
    torch.save({"params": {"other.weight": torch.ones(1)}, "params_ema": AVERAGE}, "in.pt")
    done("check", "in.pt", "--model", "net.py:Net", "--average")
    torch.save({"params": AVERAGE, "params_ema": _with("a.", AVERAGE)}, "in.pt")
    ran = ckptfix_command("check", "in.pt", "--model", "net.py:Net", "--average")
    assert ran.returncode == 1
    command = next(line for line in ran.stdout.splitlines() if "ckptfix fix" in line).split()
    done(*command[1:])
    assert unlike(dict(torch.load("in.fixed.pt")), dict(AVERAGE)) is None


@pytest.mark.parametrize("verb", ["fix", "convert", "check"])
def test_none_and_several_are_refused_by_name(verb: str):
    out = [] if verb == "check" else ["out.pt"]
    torch.save({"model": PLAIN}, "in.pt")
    ran = ckptfix_command(verb, "in.pt", *out, "--average")
    assert ran.returncode == 2
    assert "holds no averages of weights" in ran.stderr
    torch.save({"model": PLAIN, "ema": {"shadow_params": [*AVERAGE.values()]}}, "in.pt")
    ran = ckptfix_command(verb, "in.pt", *out, "--average")
    assert ran.returncode == 2
    assert "holds averages without names: ema/shadow_params, a list in the order" in ran.stderr
    torch.save({"model": PLAIN, "ema": AVERAGE, "swa": net(3.0).state_dict()}, "in.pt")
    ran = ckptfix_command(verb, "in.pt", *out, "--average")
    assert ran.returncode == 2
    assert "holds 2 averages of weights: ema, swa" in ran.stderr
    assert "add --select ema" in ran.stderr
    assert not Path("out.pt").exists()
    done(verb, "in.pt", *out, "--average", "--select", "swa")
    with pytest.raises(SelectionError, match="2 averages"):
        ckptfix.load_state_dict("in.pt", average=True)


def test_keys_that_only_look_like_averages_are_none():
    torch.save({**PLAIN, "ema_model.weight": torch.ones(9)}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--average")
    assert ran.returncode == 2
    assert "no averages" in ran.stderr

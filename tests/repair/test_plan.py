"""`fix` and its plan: what it writes loads strictly in plain torch, with the right values."""

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from ckptfix import door
from ckptfix.errors import (
    CkptfixError,
    KeyMismatchError,
    RenameError,
    SelectionError,
    UnsupportedError,
)
from ckptfix.match import target as targets
from ckptfix.repair.plan import Plan, plan
from fixtures.foonet import FooNet

FIXTURES = Path(__file__).parents[2] / "fixtures"
MODEL = ["--model", f"{FIXTURES}/foonet.py:FooNet", "--init", '{"neural_num": 4, "layers": 3}']
FOONETS = [
    "cpu.pt", "cuda.pt", "dataparallel.pt", "ddp.pt", "dataparallel_cuda.pt", "torch_compile.pt",
    "dataparallel_cuda_training.pt", "compile_ddp_stack.pt", "compiled_dataparallel.pt",
    "legacy.pt", "legacy_dataparallel_cuda.pt", "plain.safetensors", "dataparallel.safetensors",
    "swa.pt", "ema.pt", "uninstalled_class.pt",
]  # fmt: skip


class Net(nn.Module):
    """A linear layer and a BatchNorm, so that there is a buffer and a `_metadata` version."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        self.lm_head = nn.Linear(2, 5, bias=False)
        self.lm_head.weight = self.embed.weight


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "fix", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def planned(path: Path, model: nn.Module, **options) -> Plan:
    return plan(door.read(path), targets.of_module(model), **options)


def fixed(path: Path, model: nn.Module, **options) -> OrderedDict[str, torch.Tensor]:
    """What plain torch loads from the output, which the model has taken strictly."""
    out = path.with_suffix(".fixed.pt")
    door.write(planned(path, model, **options).document, out, force=True)
    found: OrderedDict[str, torch.Tensor] = torch.load(out, weights_only=True)
    model.load_state_dict(found, strict=True)
    return found


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def prefixed(prefix: str, model: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


# --- the command


@pytest.mark.parametrize("name", FOONETS)
def test_every_foonet_loads_strictly_afterwards(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.pt"
    assert run(FIXTURES / name, out, *MODEL).returncode == 0
    FooNet(4, 3).load_state_dict(torch.load(out, weights_only=True), strict=True)


def test_without_a_target_everything_else_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    done = run(FIXTURES / "dataparallel_cuda_training.pt", out)
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    wanted = torch.load(FIXTURES / "dataparallel_cuda_training.pt", map_location="cpu")
    assert list(found) == list(wanted)
    FooNet(4, 3).load_state_dict(found["model_state_dict"])
    assert found["epoch"] == wanted["epoch"]
    assert found["device"] == wanted["device"]


def test_training_state_is_kept_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    source = FIXTURES / "dataparallel_cuda_training.pt"
    assert run(source, out, *MODEL, "--keep-training-state").returncode == 0
    found = torch.load(out, weights_only=True)
    net = FooNet(4, 3)
    net.load_state_dict(found["model_state_dict"], strict=True)
    torch.optim.Adam(net.parameters()).load_state_dict(found["optimizer_state_dict"])


def test_json_has_the_plan(tmp_path: Path) -> None:
    done = run(FIXTURES / "swa.pt", tmp_path / "out.pt", *MODEL, "--json", "--dry-run")
    answer = json.loads(done.stdout)
    assert [row["code"] for row in answer["plan"]] == ["prefix-wrapper", "unexpected-keys"]
    assert answer["dropped"] == ["n_averaged"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], MODEL])
@pytest.mark.parametrize("name", ["cpu.pt", "plain.safetensors", "legacy.pt"])
def test_of_what_is_sound_a_copy_is_written(tmp_path: Path, name: str, options: list) -> None:
    out = tmp_path / f"out{Path(name).suffix}"
    done = run(FIXTURES / name, out, *options)
    assert done.returncode == 0
    assert "nothing had to be repaired; 3 tensors copied, nothing left behind" in done.stdout
    assert same(ckptfix.load(out), ckptfix.load(FIXTURES / name))
    assert run(FIXTURES / name, out, *options).returncode == 2  # it is there
    dry = run(FIXTURES / name, tmp_path / "dry.pt", *options, "--dry-run")
    assert (dry.returncode, (tmp_path / "dry.pt").exists()) == (0, False)


@pytest.mark.parametrize("name", ["whole_module.pt", "mixed_prefix.pt", "fsdp_names.pt"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    done = run(FIXTURES / name, tmp_path / "out.pt", *MODEL)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "nothing matches: is this the right model?" in done.stderr
    assert "- linears.0.weight" in done.stderr
    assert "hint: " in done.stderr


# --- the plan


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.net.", "module.model."])
def test_a_prefix_goes_where_the_model_lacks_it(tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path / "in.pt", prefixed(prefix, Net()))
    assert list(fixed(path, Net())) == list(Net().state_dict())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: nn.Sequential(OrderedDict(b=net))])
def test_a_prefix_is_added_where_the_model_has_it(tmp_path: Path, wrap) -> None:
    path = saved(tmp_path / "in.pt", Net().state_dict())
    assert list(fixed(path, wrap(Net()))) == list(wrap(Net()).state_dict())


def test_the_part_that_is_meant_is_taken_out(tmp_path: Path) -> None:
    query, key = Net(), Net(7)
    weights = {**prefixed("module.encoder_q.", query), **prefixed("module.encoder_k.", key)}
    path = saved(tmp_path / "in.pt", {"state_dict": {**weights, "module.queue": torch.ones(8)}})
    made = planned(path, Net())
    assert same(fixed(path, Net()), query.state_dict())
    assert "module.queue" in made.dropped
    assert all(name not in made.dropped for name in prefixed("module.encoder_q.", query))


def test_twins_are_refused_by_name(tmp_path: Path) -> None:
    twins = {**prefixed("student.", Net()), **prefixed("teacher.", Net())}
    path = saved(tmp_path / "in.pt", twins)
    with pytest.raises(RenameError, match=r"student.*teacher"):
        planned(path, Net())


def test_two_models_in_one_file_are_told_apart_by_fit(tmp_path: Path) -> None:
    small, large = Net(3), Net(5)
    both = {"netG": prefixed("module.", small), "netD": prefixed("module.", large)}
    path = saved(tmp_path / "in.pt", both)
    assert same(fixed(path, Net(5)), large.state_dict())


def test_two_that_fit_are_listed_and_can_be_chosen(tmp_path: Path) -> None:
    first, second = Net(), Net()
    path = saved(tmp_path / "in.pt", {"a": first.state_dict(), "b": second.state_dict()})
    with pytest.raises(SelectionError, match="a, b") as caught:
        planned(path, Net())
    assert "--select" in str(caught.value.hint)
    assert same(fixed(path, Net(), select="b"), second.state_dict())


def test_a_missing_tie_is_made(tmp_path: Path) -> None:
    net = Tied()
    path = saved(tmp_path / "in.pt", {"embed.weight": net.embed.weight.detach()})
    found = fixed(path, Tied())
    assert torch.equal(found["lm_head.weight"], net.embed.weight)
    assert found["lm_head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_buffers_the_model_no_longer_has_are_dropped_by_name(tmp_path: Path) -> None:
    weights = {**Net().state_dict(), "embeddings.position_ids": torch.arange(4)}
    made = planned(saved(tmp_path / "in.pt", weights), Net())
    assert made.dropped == ["embeddings.position_ids"]


def test_a_shape_that_differs_is_refused_with_both(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", Net(5).state_dict())
    with pytest.raises(KeyMismatchError, match=r"\[2, 5\].*\[2, 3\]"):
        planned(path, Net(3))


def test_a_missing_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    weights = Net().state_dict()
    weights["linear.wieght"] = weights.pop("linear.weight")
    with pytest.raises(KeyMismatchError) as caught:
        planned(saved(tmp_path / "in.pt", weights), Net())
    assert "'linear.wieght'" in str(caught.value.hint)


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", nn.DataParallel(Net()).state_dict())
    found = fixed(path, Net())
    assert found._metadata == Net().state_dict()._metadata  # type: ignore[attr-defined]


def test_every_refusal_has_a_hint(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", {"epoch": 3})
    with pytest.raises(CkptfixError) as caught:
        planned(path, Net())
    assert caught.value.hint is not None


# --- tensors of other kinds (situation 16)


class Wide(nn.Module):
    """A buffer of a dtype that safetensors does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128))


def special() -> dict[str, torch.Tensor]:
    return {
        "quantized": torch.quantize_per_tensor(torch.arange(3.0), 0.5, 1, torch.quint8),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
    }


def test_complex128_goes_through_fix_and_the_loader(tmp_path: Path) -> None:
    path = saved(tmp_path / "in.pt", prefixed("module.", Wide()))
    assert same(fixed(path, Wide()), Wide().state_dict())
    assert ckptfix.load_into(Wide(), path).loads


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["quantized", "sparse", "meta"])
def test_special_tensors_are_carried_by_fix_and_by_the_loader_where_they_have_bytes(
    tmp_path: Path, kind: str
) -> None:
    tensor = special()[kind]
    path = saved(tmp_path / "in.pt", {"module.w": torch.ones(3), "module.x": tensor})
    door.write(plan(door.read(path)).document, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == ["w", "x"]
    assert (found["x"].layout, found["x"].dtype) == (tensor.layout, tensor.dtype)
    assert kind == "meta" or torch.equal(dense(found["x"]), dense(tensor))
    if kind == "meta":
        with pytest.raises(UnsupportedError, match=r"'module\.x' has no bytes"):
            ckptfix.load_state_dict(path)
    else:
        loaded = ckptfix.load_state_dict(path)["module.x"]
        assert torch.equal(dense(loaded), dense(tensor))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.to_dense()


@pytest.mark.parametrize(("model", "ties"), [("Untied", 0), ("TiedAgain", 1)])
def test_ties_are_undone_where_the_model_has_none(tmp_path: Path, model: str, ties: int) -> None:
    shared = torch.randn(5, 2)
    path = saved(tmp_path / "in.pt", {"module.a.weight": shared, "module.b.weight": shared})
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Untied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = (nn.Linear(2, 5, bias=False) for _ in range(2))\n"
        "class TiedAgain(Untied):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.b.weight = self.a.weight\n"
    )
    out = tmp_path / "out.safetensors"
    done = run(path, out, "--model", f"{tmp_path}/net.py:{model}")
    assert done.returncode == 0, done.stderr
    found = safetensors.torch.load_file(out)
    assert len(found) == 2 - ties
    assert all(torch.equal(value, shared) for value in found.values())
    assert ("untied" in done.stdout) == (not ties)


def test_what_the_model_wants_and_the_container_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Counted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: object) -> None:
            assert state == {"seen": 3}

    path = saved(tmp_path / "in.pt", nn.DataParallel(Counted(2, 2)).state_dict())
    with pytest.raises(UnsupportedError, match=r"'_extra_state' is a dict of 1") as caught:
        planned(path, Counted(2, 2), tensors_only=True)
    assert ".pt" in str(caught.value.hint)


def test_a_tie_is_made_where_the_other_checkpoint_has_one(tmp_path: Path) -> None:
    saved(tmp_path / "like.pt", Tied().state_dict())
    path = saved(tmp_path / "in.pt", {"module.embed.weight": torch.rand(5, 2)})
    assert run(path, tmp_path / "out.pt", "--like", tmp_path / "like.pt").returncode == 0
    Tied().load_state_dict(torch.load(tmp_path / "out.pt"), strict=True)


def _opacus() -> dict[str, torch.Tensor]:
    return prefixed("_module.", Net())


def _quantized() -> nn.Module:
    net: nn.Module = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    return net


class Child(nn.Module):
    """A model whose only child is called as a wrapper's is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


SAVED = {
    "a model in DataParallel": lambda: {"model": nn.DataParallel(Net()), "epoch": 3},
    "a model in two of them": lambda: nn.DataParallel(nn.DataParallel(Net())),
    "a model with a child called module": lambda: {"model": Child()},
    "that child's state dict": lambda: prefixed("module.", Child()),
    "Opacus": _opacus,
    "compiled, on another device": lambda: prefixed("_orig_mod.model.", Net()),
    "averages in a wrapper": lambda: {
        "model": Net().state_dict(),
        "ema": prefixed("module.", Net()),
    },
    "a quantized model": _quantized,
    "no state dict": lambda: {"epoch": 3},
    "a list of tensors": lambda: [torch.ones(2), torch.zeros(3)],
    "an optimizer": lambda: torch.optim.SGD(Net().parameters(), 0.1).state_dict(),
}


def _errors_are_named(source: Path, out: Path, *options: str) -> None:
    """Whether each error that `inspect` finds in what `fix` wrote was named, with a reason."""
    ran = run(source, out, "--json", *options)
    if ran.returncode == 2:
        assert not out.exists()
        return
    left = {
        (row["code"], row["where"]) for row in json.loads(ran.stdout)["remaining"] if row["reason"]
    }
    found = ckptfix.open(out).findings
    assert {(row.code, row.where) for row in found if row.severity == "error"} <= left


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
def test_no_error_is_left_without_its_reason(tmp_path: Path, make, name: str) -> None:
    torch.save(make(), tmp_path / "in.pt")
    _errors_are_named(tmp_path / "in.pt", tmp_path / name)


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_no_error_of_a_fixture_is_left_without_its_reason(
    tmp_path: Path, checkpoint: Path, name: str
) -> None:
    _errors_are_named(checkpoint, tmp_path / name)
    if checkpoint.name in FOONETS:
        _errors_are_named(checkpoint, tmp_path / f"kept.{name}", *MODEL, "--keep-training-state")


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda net: nn.DataParallel(nn.DataParallel(net))]
)
def test_a_model_that_was_pickled_in_a_wrapper_is_taken_out_of_it(tmp_path: Path, wrap) -> None:
    net = Net()
    torch.save({"model": wrap(net), "epoch": 3}, tmp_path / "in.pt")
    assert "taken out of it" in run(tmp_path / "in.pt", tmp_path / "out.pt").stdout
    loaded = torch.load(tmp_path / "out.pt", weights_only=False)
    assert (type(loaded["model"]), loaded["epoch"]) == (Net, 3)
    assert same(loaded["model"].state_dict(), net.state_dict())
    assert run(tmp_path / "in.pt", tmp_path / "out.safetensors").returncode == 0
    assert same(safetensors.torch.load_file(tmp_path / "out.safetensors"), net.state_dict())
    codes = {row.code: row for row in ckptfix.open(tmp_path / "in.pt").findings}
    finding = codes["prefix-wrapper"]
    assert finding.command is not None
    assert run(*finding.command.arguments, "--force").returncode == 0


def test_what_opacus_adds_goes_without_a_model(tmp_path: Path) -> None:
    torch.save(_opacus(), tmp_path / "in.pt")
    assert run(tmp_path / "in.pt", tmp_path / "out.pt").returncode == 0
    Net().load_state_dict(torch.load(tmp_path / "out.pt"))


def test_a_prefix_that_only_a_model_can_judge_is_left_and_named(tmp_path: Path) -> None:
    torch.save(prefixed("_orig_mod.model.", Net()), tmp_path / "in.pt")
    ran = run(tmp_path / "in.pt", tmp_path / "out.pt")
    assert "left as it is: all 7 keys begin with 'model.'; only a model can say" in ran.stderr
    assert list(torch.load(tmp_path / "out.pt")) == list(prefixed("model.", Net()))


def test_the_state_dict_that_is_selected_is_the_one_that_is_written(tmp_path: Path) -> None:
    first, second = Net(), Net()
    both = {"a": nn.DataParallel(first).state_dict(), "b": nn.DataParallel(second).state_dict()}
    torch.save(both, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    assert run(tmp_path / "in.pt", out, "--select", "b").returncode == 0
    assert same(safetensors.torch.load_file(out), second.state_dict())
    assert run(tmp_path / "in.pt", tmp_path / "other.safetensors").returncode == 2


def _checked(path: Path) -> int:
    command = [sys.executable, "-m", "ckptfix", "check", str(path)]
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
def test_fix_says_yes_where_check_says_yes_of_what_it_wrote(tmp_path: Path, make) -> None:
    torch.save(make(), tmp_path / "in.pt")
    done = run(tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == (_checked(tmp_path / "out.pt") if done.returncode < 2 else 2)
    assert ("nothing had to be repaired" in done.stdout) <= (done.returncode == 0)


def test_fix_says_yes_of_a_fixture_where_check_does(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path / "out.pt")
    assert done.returncode == (_checked(tmp_path / "out.pt") if done.returncode < 2 else 2)

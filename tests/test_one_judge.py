"""One judge: a match is what torch's strict load takes, and all commands and loaders agree.

The oracle is torch itself: the model is built, and loads strictly what `torch.load` gives of the
file. What `fix` writes and what the loaders load has to be taken by it too, or all refuse alike.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from ckptfix import door
from ckptfix.errors import CkptfixError, KeyMismatchError
from ckptfix.match import target as targets
from ckptfix.repair.plan import plan
from tests.oracles import ckptfix_command, code_of, done, module_in, unlike

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

MODELS = '''
import torch
from torch import nn


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))


class Of(nn.Module):
    """A model with a buffer that is made of a dense one."""

    def __init__(self, make):
        super().__init__()
        self.register_buffer("w", make(torch.eye(4)))
        self.b = nn.Parameter(torch.zeros(4))


def Sparse(): return Of(lambda x: x.to_sparse())
def Compressed(): return Of(lambda x: x.to_sparse_csr())
def Quantized():
    options = {"scale": 0.1, "zero_point": 0, "dtype": torch.qint8}
    return Of(lambda x: torch._empty_affine_quantized((4, 4), **options))


class Lazy(nn.modules.lazy.LazyModuleMixin, nn.Module):
    cls_to_become = Dense

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.UninitializedParameter(), nn.Parameter(torch.zeros(4))


def rename(state, prefix):
    for key in list(state):
        if key.startswith(prefix + "fc."):
            state[key.replace(prefix + "fc.", prefix + "proj.", 1)] = state.pop(key)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(3, 4), nn.Linear(4, 2)


class Method(Plain):
    def _load_from_state_dict(self, state, prefix, *others):
        rename(state, prefix)
        super()._load_from_state_dict(state, prefix, *others)


class Hook(Plain):
    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self.old)

    def old(self, state, prefix, *others):
        rename(state, prefix)


class NewHook(Plain):
    def __init__(self):
        super().__init__()
        hook = lambda module, state, prefix, *_: rename(state, prefix)
        self.register_load_state_dict_pre_hook(hook)


class Override(Plain):
    def load_state_dict(self, state, strict=True):
        state = {k.replace("fc.", "proj."): v for k, v in state.items()}
        return super().load_state_dict(state, strict)


class Bare(Plain):
    """An override that does not know of strict."""

    def load_state_dict(self, state):
        rename(state, "")
        return super().load_state_dict(state)


class Unwraps(Plain):
    """What people write against `module.`"""

    def load_state_dict(self, state, *others, **options):
        state = {k.removeprefix("module."): v for k, v in state.items()}
        return super().load_state_dict(state, *others, **options)


class Grows(Plain):
    """A buffer that takes the size of the file: memory banks, priors, nearest neighbours."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.empty(0))

    def _load_from_state_dict(self, state, prefix, *others):
        if prefix + "bank" in state:
            self.bank = torch.empty_like(state[prefix + "bank"])
        super()._load_from_state_dict(state, prefix, *others)


class Fills(Plain):
    """A buffer that is None until it is loaded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", None)

    def _load_from_state_dict(self, state, prefix, *others):
        if prefix + "bank" in state:
            self.bank = torch.empty_like(state[prefix + "bank"])
        super()._load_from_state_dict(state, prefix, *others)


class Empty(Plain):
    """The same without such code: torch refuses the key."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", None)


class Splits(Plain):
    """One old key becomes several: values of the file are read, and made into others."""

    def __init__(self):
        super().__init__()
        self._register_load_state_dict_pre_hook(self.old)

    def old(self, state, prefix, *others):
        if "joint.weight" in state:
            joint = state.pop("joint.weight")
            if float(joint.abs().max()) >= 0:
                state["proj.weight"], state["proj.bias"] = joint[:, :3].clone(), joint[:, 3].clone()


class Deep(nn.Module):
    """The code lies in a child."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Method(), nn.Linear(2, 2)


class Refuses(Plain):
    def _load_from_state_dict(self, state, prefix, *others):
        raise ValueError("this model is never loaded")


class Negligent(Plain):
    """Its own load_state_dict passes over what is not there."""

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict(state, strict=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
        self.head.weight = self.embed.weight


class Extra(nn.Linear):
    seen = None

    def __init__(self):
        super().__init__(2, 2)

    def get_extra_state(self): return torch.zeros(3)
    def set_extra_state(self, state): self.seen = state
'''


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`net.py` in the current folder, and the module that it is."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODELS)
    return module_in(Path("net.py"), "one_judge_models")


def torch_takes(model: nn.Module, path: str) -> bool:
    """The oracle."""
    try:
        state = torch.load(path, weights_only=False, map_location="cpu")
        if any(getattr(value, "is_meta", False) for value in state.values()):
            return False  # what has no bytes gives the model none
        model.load_state_dict(state)
    except Exception:  # noqa: BLE001
        return False
    return True


def agree(make: Callable[[], nn.Module], path: str = "in.pt") -> bool:
    """Whether torch takes a file, after all commands and loaders have said the same of it."""
    takes, name = torch_takes(make(), path), make.__name__
    reference = f"net.py:{name}"
    assert ckptfix.check(make(), path).loads is takes
    assert code_of("check", path, "--model", reference) == (0 if takes else 1)
    untouched = make()
    before = {key: str(value) for key, value in untouched.state_dict().items()}
    fixed = code_of("fix", path, "out.pt", "--force", "--model", reference)
    bare = code_of("strip-prefix", path, "bare.pt", "--force", "--model", reference)
    assert bare == 1 if takes else bare in (0, 2)
    assert bare or torch_takes(make(), "bare.pt")
    if fixed == 2:
        assert not takes
        assert not Path("out.pt").exists()
        refusals = []
        for refusing in (
            lambda: ckptfix.load_into(untouched, path),
            lambda: ckptfix.load_state_dict(path, model=make()),
            lambda: plan(door.read(path), targets.of_module(make())),
        ):
            with pytest.raises(CkptfixError) as raised:
                refusing()
            refusals.append((type(raised.value), str(raised.value), str(raised.value.hint)))
        assert len(set(refusals)) == 1
        assert {key: str(value) for key, value in untouched.state_dict().items()} == before
        return takes
    assert ckptfix.load_into(untouched, path).loads
    loaded = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_state_dict(ckptfix.load_state_dict(path, model=make()))
    assert unlike(dict(loaded.state_dict()), dict(untouched.state_dict())) is None
    assert fixed in ((0, 1) if takes else (0,))
    if fixed == 0:
        assert torch_takes(again := make(), "out.pt")
        assert unlike(dict(again.state_dict()), dict(untouched.state_dict())) is None
    return takes


# --- kinds of tensors


class Called:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


EYE = torch.eye(4)
KINDS: dict[str, Callable[[], Any]] = {
    "dense": lambda: EYE,
    "parameter": lambda: nn.Parameter(EYE.clone()),
    "half": lambda: EYE.half(),
    "complex": lambda: torch.complex(EYE, EYE),
    "float8": lambda: EYE.to(torch.float8_e4m3fn),
    "turned": lambda: torch.arange(16.0).reshape(4, 4).t(),
    "expanded": lambda: torch.ones(1).expand(4, 4),
    "sparse": lambda: EYE.to_sparse(),
    "sparse parameter": lambda: nn.Parameter(EYE.to_sparse()),
    "sparse 7 x 7": lambda: torch.eye(7).to_sparse(),
    "sparse and empty": lambda: torch.zeros(4, 4).to_sparse(),
    "CSR": lambda: EYE.to_sparse_csr(),
    "CSC": lambda: EYE.to_sparse_csc(),
    "BSR": lambda: EYE.to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(EYE, 0.1, 0, torch.qint8),
    "quantized per channel": lambda: torch.quantize_per_channel(
        EYE, torch.ones(4), torch.zeros(4), 0, torch.qint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4)] * 4),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(4)] * 4, layout=torch.jagged),
    "meta": lambda: EYE.to("meta"),
    "empty": lambda: torch.empty(0),
    "one dimension": lambda: torch.ones(16),
    "numpy": lambda: EYE.numpy(),
    "TPU": lambda: Called(
        torch._utils._rebuild_device_tensor_from_numpy, EYE.numpy(), torch.float32, "xla:1", False
    ),
    "TPU, cast": lambda: Called(
        torch._utils._rebuild_device_tensor_from_numpy, EYE.numpy(), torch.bfloat16, "xla:1", False
    ),
    "number": lambda: 3.0,
    "text": lambda: "w",
    "list": lambda: [1.0] * 4,
    "None": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["Dense", "Sparse", "Compressed", "Quantized", "Lazy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_kind_matches_where_torch_copies_it(
    models: ModuleType, model: str, kind: str
) -> None:
    torch.save(OrderedDict(w=KINDS[kind](), b=torch.ones(4)), "in.pt")
    agree(getattr(models, model))


def test_a_distributed_tensor_is_no_match_until_it_is_joined(models: ModuleType) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{Path('meet').resolve()}",
                            rank=0, world_size=1)  # fmt: skip
    try:
        mesh = DeviceMesh("cpu", [0])
        torch.save({"w": distribute_tensor(EYE, mesh, [Replicate()]), "b": torch.ones(4)}, "in.pt")
        assert not agree(models.Dense)
    finally:
        dist.destroy_process_group()
    ran = ckptfix_command("check", "in.pt", "--model", "net.py:Dense")
    assert "its tensors are in pieces, which torch does not join" in ran.stdout
    assert torch.equal(ckptfix.load_state_dict("in.pt", model=models.Dense())["w"], EYE)


@pytest.mark.filterwarnings("ignore")
def test_every_kind_is_refused_by_a_file_as_it_is_by_a_model() -> None:
    torch.save({"w": EYE, "b": torch.ones(4)}, "like.pt")
    for kind in ("sparse", "sparse 7 x 7", "CSR", "quantized", "nested", "meta", "numpy"):
        torch.save({"w": KINDS[kind](), "b": torch.ones(4)}, "in.pt")
        ran = ckptfix_command("check", "in.pt", "--like", "like.pt", "--json")
        told = json.loads(ran.stdout)
        assert (ran.returncode, told["loads"]) == (1, False)
        assert [row["key"] for row in told["kind_mismatch"]] == ["w"]


def test_an_extra_state_of_any_type_and_shape_is_the_models_own_affair(models: ModuleType) -> None:
    for state in (torch.zeros(7), {"a": 1}, torch.eye(2).to_sparse(), None):
        torch.save({**nn.Linear(2, 2).state_dict(), "_extra_state": state}, "in.pt")
        assert agree(models.Extra)


# --- models with code of their own

OLD = {f"{name}.{part}" for name in ("fc", "out") for part in ("weight", "bias")}
OF_OLD = ["Method", "Hook", "NewHook", "Override", "Bare"]


def weights(first: str = "proj") -> dict[str, torch.Tensor]:
    shapes = {
        f"{first}.weight": (4, 3),
        f"{first}.bias": (4,),
        "out.weight": (2, 4),
        "out.bias": (2,),
    }
    return {key: torch.rand(shape) for key, shape in shapes.items()}


FILES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "new": weights,
    "old": lambda: weights("fc"),
    "bank": lambda: {**weights(), "bank": torch.rand(7, 5)},
    "wrapped": lambda: {f"module.{key}": value for key, value in weights().items()},
    "old, wrapped": lambda: {f"module.{key}": value for key, value in weights("fc").items()},
    "old, compiled": lambda: {f"_orig_mod.{key}": value for key, value in weights("fc").items()},
    "more": lambda: {**weights(), "fourth.weight": torch.ones(2)},
    "old, more": lambda: {**weights("fc"), "fourth.weight": torch.ones(2)},
    "less": lambda: {key: value for key, value in weights().items() if key != "out.bias"},
    "other": lambda: {**weights(), "out.bias": torch.rand(3)},
    "old, other": lambda: {**weights("fc"), "fc.bias": torch.rand(3)},
    "joint": lambda: {"joint.weight": torch.rand(4, 4), "out.weight": torch.rand(2, 4),
                      "out.bias": torch.rand(2)},
    "strange": lambda: {"a": torch.ones(1)},
}  # fmt: skip
LOADERS = [
    "Plain", *OF_OLD, "Unwraps", "Grows", "Fills", "Empty", "Splits", "Refuses",
]  # fmt: skip


@pytest.mark.parametrize("model", LOADERS)
@pytest.mark.parametrize("file", FILES)
def test_the_models_own_loader_decides(models: ModuleType, model: str, file: str) -> None:
    torch.save(FILES[file](), "in.pt")
    agree(getattr(models, model))


@pytest.mark.parametrize("model", OF_OLD)
def test_old_keys_that_the_model_knows_load_and_keep_their_values(
    models: ModuleType, model: str
) -> None:
    for file in ("old", "old, wrapped", "old, compiled", "old, more"):
        state = FILES[file]()
        torch.save(state, "in.pt")
        net = getattr(models, model)()
        report = ckptfix.load_into(net, "in.pt")
        assert report.loads
        assert unlike([*net.state_dict().values()], [*state.values()][:4]) is None


def test_a_buffer_that_is_none_is_filled_or_refused(models: ModuleType) -> None:
    state = FILES["bank"]()
    torch.save(state, "in.pt")
    for model in (models.Fills, models.Grows):
        net = model()
        assert ckptfix.load_into(net, "in.pt").loads
        assert torch.equal(net.bank, state["bank"])
    assert not ckptfix.check(models.Empty(), "in.pt").loads
    assert ckptfix.check(models.Empty(), "in.pt").unexpected == ["bank"]


def test_code_in_a_child_decides_too_and_is_found_behind_a_prefix(models: ModuleType) -> None:
    head = {f"head.{key}": value for key, value in nn.Linear(2, 2).state_dict().items()}
    state = {f"body.{key}": value for key, value in weights("fc").items()} | head
    torch.save(state, "in.pt")
    assert agree(models.Deep)
    torch.save(
        {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, "in.pt"
    )
    net = models.Deep()
    assert ckptfix.load_into(net, "in.pt").loads
    assert unlike([*net.state_dict().values()], [*state.values()]) is None


def test_a_model_keeps_its_own_values_while_it_is_asked(models: ModuleType) -> None:
    torch.save(FILES["bank"](), "in.pt")
    for model in (models.Grows, models.Fills, models.Splits, models.Refuses):
        net = model()
        before = dict(vars(net)), {id(value) for value in net.state_dict(keep_vars=True).values()}
        values = {key: value.clone() for key, value in net.state_dict().items()}
        ckptfix.check(net, "in.pt")
        assert vars(net) == before[0]
        assert {id(value) for value in net.state_dict(keep_vars=True).values()} == before[1]
        assert unlike(dict(net.state_dict()), values) is None
        assert not net._load_state_dict_post_hooks


def test_a_model_that_refuses_is_heard(models: ModuleType) -> None:
    torch.save(weights(), "in.pt")
    with pytest.raises(KeyMismatchError, match="ValueError: this model is never loaded"):
        ckptfix.load_into(models.Refuses(), "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt", "--model", "net.py:Refuses")
    assert ran.returncode == 2
    assert "this model is never loaded" in ran.stderr.splitlines()[0]


def test_what_a_models_own_loader_passes_over_is_named(models: ModuleType) -> None:
    torch.save(FILES["less"](), "in.pt")
    report = ckptfix.check(models.Negligent(), "in.pt")
    assert (report.loads, report.forgiven, report.random_numel) == (True, ["out.bias"], 2)
    out = done("check", "in.pt", "--model", "net.py:Negligent")
    assert "  - out.bias" in out
    torch.save({f"module.{key}": value for key, value in weights().items()}, "in.pt")
    assert not ckptfix.check(models.Negligent(), "in.pt").loads
    net = models.Negligent()
    assert ckptfix.load_into(net, "in.pt").forgiven == []
    assert unlike([*net.state_dict().values()], [*torch.load("in.pt").values()]) is None


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm"])
@pytest.mark.filterwarnings("ignore")
def test_torchs_own_hooks_decide(kind: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(getattr(nn.utils.parametrizations, kind)(nn.Linear(2, 2)))

    old = nn.Sequential(getattr(nn.utils, kind)(nn.Linear(2, 2)))
    for state in (old.state_dict(), make().state_dict(), nn.Linear(2, 2).state_dict()):
        torch.save(state, "in.pt")
        assert ckptfix.check(make(), "in.pt").loads is torch_takes(make(), "in.pt")


# --- ties


def test_two_tensors_for_one_are_refused_by_all_with_the_same_words(models: ModuleType) -> None:
    one, other = torch.rand(5, 2), torch.rand(5, 2)
    torch.save({"embed.weight": one, "head.weight": other}, "in.pt")
    said = "'embed.weight' and 'head.weight' are one tensor of net.py:Tied, and two different ones"
    assert not ckptfix.check(models.Tied(), "in.pt").loads
    ran = ckptfix_command("check", "in.pt", "--model", "net.py:Tied")
    assert ran.returncode == 1
    assert said in ran.stdout
    for verb in ("fix", "strip-prefix"):
        ran = ckptfix_command(verb, "in.pt", "out.pt", "--model", "net.py:Tied")
        assert (ran.returncode, Path("out.pt").exists()) == (2, False)
        assert said in ran.stderr
    for load in (ckptfix.load_into, lambda net, path: ckptfix.load_state_dict(path, model=net)):
        with pytest.raises(KeyMismatchError, match="are one tensor of Tied, and two different"):
            load(models.Tied(), "in.pt")


def test_a_tied_key_in_safetensors_is_written_once_and_said_to_be_or_twice(
    models: ModuleType,
) -> None:
    weight = torch.rand(5, 2)
    torch.save({"module.embed.weight": weight, "module.head.weight": weight}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "once.safetensors", "--model", "net.py:Tied")
    assert ran.returncode == 0, ran.stderr
    assert "load_model" in ran.stderr
    assert "--untie" in ran.stderr
    assert f"{weight.nbytes} B more" in ran.stderr
    safetensors.torch.load_model(models.Tied(), "once.safetensors")
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        models.Tied().load_state_dict(safetensors.torch.load_file("once.safetensors"))
    ran = ckptfix_command("check", "once.safetensors", "--model", "net.py:Tied")
    assert ran.returncode == 1
    assert "  - head.weight" in ran.stdout
    (fix,) = (line.split()[1:] for line in ran.stdout.splitlines() if "  ckptfix fix" in line)
    assert ckptfix_command(*fix).returncode == 0
    for name in ("once.fixed.safetensors", "both.safetensors"):
        if name == "both.safetensors":
            done("fix", "in.pt", name, "--model", "net.py:Tied", "--untie")
        net = models.Tied()
        net.load_state_dict(safetensors.torch.load_file(name), strict=True)
        assert torch.equal(net.embed.weight, weight)
        assert ckptfix_command("check", name, "--model", "net.py:Tied").returncode == 0


@pytest.mark.parametrize("out", ["out.safetensors", "out/"])
def test_strip_prefix_writes_no_tied_key_once_where_the_model_wants_both(
    models: ModuleType, out: str
) -> None:
    weight = torch.rand(5, 2)
    torch.save({"module.embed.weight": weight, "module.head.weight": weight}, "in.pt")
    ran = ckptfix_command("strip-prefix", "in.pt", out, "--model", "net.py:Tied")
    assert (ran.returncode, Path(out).exists()) == (2, False)
    assert "embed.weight = head.weight once" in ran.stderr
    fix = ran.stderr.splitlines()[-1].partition(": ckptfix ")[2].split()
    assert ckptfix_command(*fix).returncode == 0
    files = [Path(out)] if Path(out).is_file() else sorted(Path(out).glob("*.safetensors"))
    state = {
        key: value for file in files for key, value in safetensors.torch.load_file(file).items()
    }
    models.Tied().load_state_dict(state, strict=True)
    assert ckptfix_command("check", out, "--model", "net.py:Tied").returncode == 0
    done("fix", "in.pt", out, "--force", "--model", "net.py:Tied")
    assert ckptfix_command("check", out, "--model", "net.py:Tied").returncode == 1
    done("strip-prefix", "in.pt", "out.pt", "--model", "net.py:Tied")
    models.Tied().load_state_dict(torch.load("out.pt"), strict=True)


def test_untie_without_a_target_is_a_misuse() -> None:
    torch.save({"w": torch.ones(2)}, "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.safetensors", "--untie")
    assert (ran.returncode, Path("out.safetensors").exists()) == (2, False)
    assert "--untie is for --model or --like" in ran.stderr


# --- strip-prefix with a target


def test_strip_prefix_takes_what_stands_between_file_and_model(models: ModuleType) -> None:
    state = weights()
    value = {"net": {f"module.model.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(value, "in.pt")
    done("strip-prefix", "in.pt", "out.pt", "--model", "net.py:Plain")
    found = torch.load("out.pt")
    assert found["epoch"] == 3
    assert unlike(dict(found["net"]), state) is None
    models.Plain().load_state_dict(found["net"], strict=True)
    done("strip-prefix", "in.pt", "again.pt", "--like", "out.pt")
    assert unlike(torch.load("again.pt"), found) is None


@pytest.mark.parametrize("file", ["more", "less", "other", "strange"])
def test_strip_prefix_refuses_what_stripping_does_not_make_load(file: str) -> None:
    torch.save({f"module.{key}": value for key, value in FILES[file]().items()}, "in.pt")
    ran = ckptfix_command("strip-prefix", "in.pt", "out.pt", "--model", "net.py:Plain")
    assert (ran.returncode, Path("out.pt").exists()) == (2, False)
    assert "error: in.pt: " in ran.stderr
    assert "hint: " in ran.stderr
    if file == "more":
        fix = ran.stderr.splitlines()[-1].partition(": ckptfix ")[2].split()
        assert ckptfix_command(*fix).returncode == 0


def test_strip_prefix_with_two_ways_or_other_options_is_refused() -> None:
    twins = {f"{who}.{key}": value for who in "ab" for key, value in weights().items()}
    torch.save(twins, "in.pt")
    ran = ckptfix_command("strip-prefix", "in.pt", "out.pt", "--model", "net.py:Plain")
    assert ran.returncode == 2
    assert "in 2 ways" in ran.stderr
    for option in (["--prefix", "a"], ["--partial"], ["--select", "a", "--select", "b"]):
        ran = ckptfix_command("strip-prefix", "in.pt", "out.pt", "--model", "net.py:Plain", *option)
        assert ran.returncode == 2
        assert "--model" in ran.stderr


# --- one list of reasons


def test_check_and_fix_name_one_reason_where_several_state_dicts_are_there() -> None:
    Path("net.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))\n"
    )
    body, heads = nn.Linear(3, 3).state_dict(), nn.Linear(3, 9).state_dict()
    model = {f"0.{k}": v for k, v in body.items()} | {f"1.{k}": v for k, v in heads.items()}
    torch.save({"model": model, "critic": {"w": torch.ones(2), "v": torch.ones(3)}}, "in.pt")
    checked = ckptfix_command("check", "in.pt", "--model", "net.py:net")
    fixed = ckptfix_command("fix", "in.pt", "out.pt", "--model", "net.py:net")
    assert (checked.returncode, fixed.returncode) == (1, 2)
    reason = "only the classifier head differs: 1.weight [9, 3] vs [4, 3]"
    assert reason in checked.stdout
    assert reason in fixed.stderr


class Window(nn.Module):
    """A layer with buffers that the model computes, as Swin has them."""

    def __init__(self, size: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.register_buffer("attn_mask", torch.zeros(size, 4, 4))
        self.register_buffer("relative_position_index", torch.zeros(4, 4))
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(4, classes)


def told(state: dict[str, Any], model: nn.Module) -> KeyMismatchError:
    torch.save(state, "in.pt")
    with pytest.raises(KeyMismatchError) as raised:
        ckptfix.load_into(model, "in.pt")
    return raised.value


def test_a_buffer_for_another_resolution_is_no_head() -> None:
    error = told(Window(9).state_dict(), Window())
    assert "only what the model computes for its resolution differs: attn_mask" in error.what
    assert "head" not in str(error.hint)
    error = told(Window(9, 7).state_dict(), Window())
    assert "3 shapes differ" in error.what
    state = {f"like.{key}": value for key, value in Window(9).state_dict().items()}
    torch.save(state, "in.pt")
    torch.save({f"like.{key}": value for key, value in Window().state_dict().items()}, "like.pt")
    ran = ckptfix_command("check", "in.pt", "--like", "like.pt")
    assert "classifier" not in ran.stdout


def test_a_table_of_queries_is_no_head() -> None:
    state = {"queries.weight": torch.ones(300, 4), "fc.weight": torch.ones(2, 4)}
    wanted = {"queries": nn.Embedding(100, 4), "fc": nn.Linear(4, 2, bias=False)}
    error = told(state, nn.ModuleDict(wanted))
    assert "a shape differs: queries.weight [300, 4] vs [100, 4]" in error.what
    state = {"queries.weight": torch.ones(100, 4), "fc.weight": torch.ones(9, 4)}
    assert "only the classifier head differs" in told(state, nn.ModuleDict(wanted)).what


@pytest.mark.parametrize("name", ["a", "fc1", "out_proj", "linear_in"])
def test_a_layer_that_others_follow_is_no_head(name: str) -> None:
    layers = {name: nn.Linear(4, 4), "z": nn.Linear(4, 3)}
    state = nn.ModuleDict({**layers, name: nn.Linear(4, 5)}).state_dict()
    assert "2 shapes differ, the first" in told(state, nn.ModuleDict(layers)).what
    state = nn.ModuleDict({**layers, "z": nn.Linear(4, 5)}).state_dict()
    assert "only the classifier head differs" in told(state, nn.ModuleDict(layers)).what


@pytest.mark.parametrize("value", [None, [[1.0]], 3, "text"])
@pytest.mark.parametrize("key", ["running_mean", "weight"])
def test_what_is_no_tensor_is_called_that(key: str, value: object) -> None:
    model = nn.BatchNorm1d(2)
    error = told({**model.state_dict(), key: value}, model)
    assert f"{key} is no tensor in the file" in error.what
    assert "resolution" not in str(error)


def test_what_strict_false_would_do_is_said_of_parameters_alone() -> None:
    Path("net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc, self.embed = nn.Linear(2, 3), nn.Embedding(5, 2)\n"
        "        self.head = nn.Linear(2, 5, bias=False)\n"
        "        self.head.weight = self.embed.weight\n"
        "        self.register_buffer('position_ids', torch.arange(512))\n"
    )
    whole = {"fc.weight": torch.ones(3, 2), "fc.bias": torch.ones(3),
             "embed.weight": torch.ones(5, 2), "head.weight": torch.ones(5, 2),
             "position_ids": torch.arange(512)}  # fmt: skip

    def without(*keys: str, **others: torch.Tensor) -> str:
        state = {key: value for key, value in whole.items() if key not in keys}
        torch.save({**state, **others}, "in.pt")
        ran = ckptfix_command("check", "in.pt", "--model", "net.py:Net")
        assert ran.returncode == 1
        return str(ran.stdout)

    assert "at random" not in without("position_ids")
    assert "position_ids would keep what the model gives them" in without("position_ids")
    assert "at random" not in without("head.weight")
    assert "With strict=False, 3 of 541 elements would silently stay at random." in without(
        "fc.bias"
    )
    shaped = without("fc.bias", **{"fc.weight": torch.ones(2, 2)})
    assert "at random" not in shaped
    assert "strict=False would not help" in shaped


# --- what has no numbers


def test_placeholders_of_zero_3_are_named_everywhere(models: ModuleType) -> None:
    state = {"embed.weight": torch.empty(0), "head.weight": torch.empty(0)}
    error = told(state, models.Tied())
    assert "placeholders: embed.weight, head.weight have no elements" in error.what
    assert "zero_to_fp32" in str(error.hint)
    assert "error   placeholders: 2 tensors have no elements" in done("inspect", "in.pt")
    ran = ckptfix_command("fix", "in.pt", "out.pt")
    assert "placeholders of ZeRO-3" in ran.stderr
    torch.save({"bank": torch.empty(0), "w.weight": torch.ones(2)}, "in.pt")
    assert "placeholders" not in done("inspect", "in.pt")


def test_what_was_offloaded_is_named_everywhere() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = dict(net.state_dict()) | {"1.weight": torch.empty(2, 2, device="meta")}
    error = told(state, net)
    assert "saved while offloaded: 1.weight has no bytes" in error.what
    said = "1 tensor has no bytes: saved while offloaded (1.weight)"
    assert said in done("inspect", "in.pt")
    assert said in ckptfix_command("fix", "in.pt", "out.pt").stderr
    ran = ckptfix_command("check", "in.pt")
    assert (ran.returncode, said in ran.stdout) == (1, True)
    with pytest.raises(CkptfixError, match=r"'1\.weight' has no bytes"):
        ckptfix.load_state_dict("in.pt")


PACKED: dict[str, dict[str, torch.Tensor]] = {
    "bitsandbytes": {
        "fc.weight": torch.zeros(16, 1, dtype=torch.uint8),
        "fc.weight.absmax": torch.zeros(1),
        "fc.weight.quant_map": torch.zeros(16),
    },
    "GPTQ": {
        "fc.qweight": torch.zeros(1, 4, dtype=torch.int32),
        "fc.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "fc.scales": torch.zeros(1, 4),
    },
    "compressed-tensors": {
        "fc.weight_packed": torch.zeros(4, 1, dtype=torch.int32),
        "fc.weight_scale": torch.zeros(4, 1),
        "fc.weight_shape": torch.tensor([4, 8]),
    },
}


@pytest.mark.parametrize("library", PACKED)
def test_packed_weights_are_not_blamed_on_another_configuration(library: str) -> None:
    error = told(
        PACKED[library] | {"fc.bias": torch.zeros(4)}, nn.ModuleDict({"fc": nn.Linear(8, 4)})
    )
    assert "quantiz" in error.what
    assert "--init" not in str(error.hint)
    assert "warning packed-weights" in done("inspect", "in.pt")


def test_arrays_of_numpy_are_no_match_until_they_are_repaired(models: ModuleType) -> None:
    torch.save({key: value.numpy() for key, value in weights().items()}, "in.pt")
    assert not agree(models.Plain)
    ran = ckptfix_command("fix", "in.pt", "fixed.pt", "--model", "net.py:Plain")
    assert "4 keys hold a numpy array" in ran.stdout
    assert np.array_equal(torch.load("fixed.pt")["out.bias"].numpy(),
                          torch.load("in.pt", weights_only=False)["out.bias"])  # fmt: skip

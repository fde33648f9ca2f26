"""Situations: a model, something that happened to its checkpoint, and what a strict load must give.

`MODELS` are written to `net.py`, so that commands can build them too. A spoil takes a trained model
and writes one file or folder in which its weights lie as people find them. What it returns says
what may be made of it:

- `right`: the model's own values, which every verb has to give;
- `any`: a verb may refuse, but not give other values;
- `wrong`: no tool can know the values, so that every verb has to refuse;
- `damaged`: whatever copies bytes has to see it (where they are loaded, nothing reads them all).
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

if TYPE_CHECKING:
    from collections.abc import Iterable

State = OrderedDict[str, Any]
Spoil = Callable[[nn.Module, Path], str]

MODELS = '''
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class Foo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.norm = nn.LayerNorm(3)
        self.head.weight = self.embed.weight


class Owner(nn.Module):
    """Has a child called module, and one called model."""

    def __init__(self):
        super().__init__()
        self.module, self.model, self.head = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)


class OnlyModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


class Positions(nn.Module):
    """Buffers that the model computes, kept and not kept."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 2), nn.Linear(2, 2)
        self.register_buffer("position_ids", torch.arange(6).reshape(1, 6))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("cache", torch.zeros(3), persistent=False)


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.counted = nn.Linear(3, 3), 7

    def get_extra_state(self): return {"counted": self.counted}
    def set_extra_state(self, state): self.counted = state["counted"]


class Renames(nn.Module):
    """Takes files of its first version too."""

    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self._register_load_state_dict_pre_hook(self.old)

    def old(self, state, prefix, *others):
        for key in [key for key in state if key.startswith(prefix + "fc.")]:
            state[prefix + "proj." + key[len(prefix) + 3:]] = state.pop(key)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).bfloat16(), nn.LayerNorm(3)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.backbone = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])})
        self.decode_head = nn.Linear(3, 4)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 4))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, 2, bidirectional=True), nn.Linear(8, 2)


class Numbers(nn.Module):
    """A 0-d parameter, complex and float64 values, one of no elements, one that is turned."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        self.turned = nn.Parameter(torch.zeros(3, 2).t())
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.zeros(4, dtype=torch.bool))


class Sequence(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


class Single(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


class Shared(nn.Module):
    """Tied through memory: two parameters, and no one object."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.norm = nn.LayerNorm(3)
        self.head.weight = nn.Parameter(self.embed.weight.data)


class Turned(nn.Module):
    """The decoder is the encoder, turned round."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 3), nn.Linear(3, 4)
        self.decode.weight = nn.Parameter(self.encode.weight.detach().t())


class Hole(nn.Module):
    """A module was there and is None."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.norm = None


class Checks(nn.Module):
    """Refuses extra states of other versions."""

    def __init__(self):
        super().__init__()
        self.fc, self.counted = nn.Linear(3, 3), 2

    def get_extra_state(self): return {"version": self.counted}

    def set_extra_state(self, state):
        if state["version"] != 2:
            raise RuntimeError("another version")
'''
NAMES = [
    "Foo", "Conv", "Tied", "Owner", "OnlyModule", "Positions", "Extra", "Renames", "Normed",
    "Half", "Deep", "Encoder", "Recurrent", "Numbers", "Sequence", "Single",
    "Shared", "Turned", "Hole", "Checks",
]  # fmt: skip


def trained(model: nn.Module, seed: int) -> nn.Module:
    """The same model with values of its own in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            elif tensor.dtype is not torch.bool:
                tensor.copy_(torch.randint(100, tensor.shape, generator=generator))
    return model


class Spoils(dict[str, Spoil]):
    """All that may have happened, by name."""

    def __call__(self, name: str) -> Callable[[Spoil], Spoil]:
        def keep(spoil: Spoil) -> Spoil:
            assert name not in self
            self[name] = spoil
            return spoil

        return keep

    def of_state(self, name: str, change: Callable[[State], Any], outcome: str = "right") -> None:
        """A spoil that saves something made of the state dict."""

        def spoil(model: nn.Module, path: Path) -> str:
            state = state_of(model)
            spoiled = change(state)
            torch.save(spoiled, path)
            same = isinstance(spoiled, dict) and list(spoiled) == list(state)
            return "right" if outcome == "wrong keys" and same else outcome.split()[0]

        self(name)(spoil)

    def of_bytes(self, name: str, change: Callable[[bytes], bytes], outcome: str = "right") -> None:
        """A spoil of the file that torch wrote."""

        def spoil(model: nn.Module, path: Path) -> str:
            path.write_bytes(change(saved(state_of(model))))
            return outcome

        self(name)(spoil)


SPOILS = Spoils()


def state_of(model: nn.Module) -> State:
    return OrderedDict(model.state_dict())


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def renamed(state: State, name: Callable[[str], str]) -> State:
    return OrderedDict((name(key), value) for key, value in state.items())


def prefixed(state: State, prefix: str) -> State:
    return renamed(state, lambda key: prefix + key)


def changed(state: State, change: Callable[[torch.Tensor], Any]) -> State:
    """With one tensor replaced: the first that has two dimensions."""
    key = next(key for key, value in state.items() if getattr(value, "ndim", 0) == 2)
    return OrderedDict(state, **{key: change(state[key])})


# --- names

PREFIXES = [
    "module.", "module.module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.",
    "_forward_module.", "_fsdp_wrapped_module.", "_module.", "net.", "backbone.model.",
    "_fsdp_wrapped_module._fpw_module.", "_forward_module._original_module.",
]  # fmt: skip
RENAMED: dict[str, Callable[[State], State]] = {
    **{f"prefix {each}": partial(prefixed, prefix=each) for each in PREFIXES},
    "FSDP inside": partial(renamed, name=lambda key: key.replace(".", "._fsdp_wrapped_module.", 1)),
    "compiled parts": partial(renamed, name=lambda key: key.replace(".", "._orig_mod.", 1)),
}
for each, change in RENAMED.items():
    SPOILS.of_state(each, change)


def half_wrapped(state: State) -> State:
    names = {key: key if at % 2 else f"module.{key}" for at, key in enumerate(state)}
    return renamed(state, names.__getitem__)


SPOILS.of_state("half of the keys wrapped", half_wrapped, "any")

# --- what lies around


def averaged(state: State) -> State:
    """Another state of the same model."""
    floats = (k for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point())
    return OrderedDict(state, **{key: state[key] + 1 for key in floats})


def lightning(state: State) -> Any:
    callbacks = {"Early": {"best": torch.ones(())}}
    settings = {"hyper_parameters": Namespace(lr=0.1), "callbacks": callbacks}
    return {"state_dict": prefixed(state, "model."), **settings, "epoch": 2}


def deepspeed(state: State) -> Any:
    return {"module": prefixed(state, "module."), "ds_version": "0.16", "dp_world_size": 1}


class Mapping(OrderedDict[str, Any]):
    """What some programs derive from dict."""


AROUND: dict[str, Callable[[State], Any]] = {
    "as it is": dict,
    "ordered": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "nested twice": lambda state: {"checkpoint": {"model": state}, "args": Namespace(lr=0.1)},
    "averages beside": lambda state: {"model": state, "model_ema": averaged(state)},
    "params and params_ema": lambda state: {"params_ema": averaged(state), "params": state},
    "Lightning": lightning,
    "DeepSpeed": deepspeed,
    "a mapping of its own": Mapping,
    "mappings of their own": lambda state: Mapping(model=Mapping(state), epoch=Mapping()),
    "the same one twice": lambda state: {"model": state, "state_dict": state},
}
for each, around in AROUND.items():
    SPOILS.of_state(each, around)
SPOILS.of_state(
    "two of the same shape", lambda state: {"student": state, "teacher": averaged(state)}, "wrong"
)
SPOILS.of_state(
    "another one beside", lambda state: {"net": state, "other": {"w": torch.ones(9, 9)}}, "any"
)
SPOILS.of_state("a list of tensors", lambda state: list(state.values()), "any")


@SPOILS("with its optimizer")
def with_its_optimizer(model: nn.Module, path: Path) -> str:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    keep = {
        key: torch.as_tensor(value).clone()
        for key, value in state_of(model).items()
        if isinstance(value, torch.Tensor)
    }
    optimizer.step()
    state = OrderedDict((key, keep.get(key, value)) for key, value in state_of(model).items())
    torch.save({"model": prefixed(state, "module."), "optimizer": optimizer.state_dict()}, path)
    model.load_state_dict(state)
    return "right"


@SPOILS("the whole model")
def the_whole_model(model: nn.Module, path: Path) -> str:
    return whole(model, model, path)


@SPOILS("the wrapped model in a dict")
def the_wrapped_model(model: nn.Module, path: Path) -> str:
    return whole(model, {"model": nn.DataParallel(model), "epoch": 1}, path)


def whole(model: nn.Module, value: Any, path: Path) -> str:
    """Save a model itself. What its own `get_extra_state` would give is known to its code alone."""
    parametrized = any(map(is_parametrized, model.modules()))  # torch refuses to pickle these
    torch.save(state_of(model) if parametrized else value, path)
    return "any" if hasattr(model, "counted") else "right"


@SPOILS("bytes in a pickle")
def bytes_in_a_pickle(model: nn.Module, path: Path) -> str:
    path.write_bytes(pickle.dumps({"module_": saved(state_of(model)), "epoch": 1}))
    return "any"


# --- kinds of tensors


def parameters(state: State) -> State:
    def kept(value: Any) -> Any:
        can_learn = isinstance(value, torch.Tensor) and value.is_floating_point()
        return nn.Parameter(value) if can_learn else value

    return OrderedDict((key, kept(value)) for key, value in state.items())


def to_numpy(tensor: torch.Tensor) -> Any:
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


SPOILS.of_state("parameters", parameters)
for each, kind, outcome in (
    ("float64", lambda t: t if t.is_complex() else t.double(), "any"),
    ("turned", lambda t: t.t().contiguous().t(), "right"),
    ("a part of more", lambda t: torch.stack([t, t + 1])[0], "right"),
    ("meta", lambda t: t.to("meta"), "wrong"),
    ("sparse", lambda t: t.to_sparse(), "any"),
    ("CSR", lambda t: t.to_sparse_csr(), "any"),
    ("quantized", quantized, "any"),
    ("placeholder", lambda t: torch.empty(0, dtype=t.dtype), "wrong"),
    ("flat", lambda t: t.flatten(), "wrong"),
    ("numpy", to_numpy, "any"),
    ("a number in place of one", lambda t: 1.0, "wrong"),
):
    SPOILS.of_state(each, partial(changed, change=kind), outcome)


@SPOILS("one of a tie differs")
def one_of_a_tie_differs(model: nn.Module, path: Path) -> str:
    state, seen = state_of(model), set()
    outcome = "right"
    for key, value in state_of(model).items():
        if isinstance(value, torch.Tensor) and value.numel():
            memory = value.untyped_storage().data_ptr()
            if memory in seen:
                state[key], outcome = value + 1, "wrong"
            seen.add(memory)
    torch.save(state, path)
    return outcome


@SPOILS("an extra state of another version")
def another_version(model: nn.Module, path: Path) -> str:
    state = state_of(model)
    old = "version" in state.get("_extra_state", {})
    torch.save({**state, "_extra_state": {"version": 1}} if old else state, path)
    return "wrong" if old else "right"


@SPOILS("float4")
def float4(model: nn.Module, path: Path) -> str:
    torch.save(
        changed(state_of(model), lambda t: t.to(torch.uint8).view(torch.float4_e2m1fn_x2)), path
    )
    return "wrong"


@SPOILS("saved on GPUs")
def saved_on_gpus(model: nn.Module, path: Path) -> str:
    before = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: "cuda:3"
    try:
        torch.save(prefixed(state_of(model), "module."), path)
    finally:
        torch.serialization.location_tag = before
    return "right"


# --- keys


def part(state: State, start: int | None, stop: int | None) -> State:
    return OrderedDict(list(state.items())[start:stop])


def with_other_head(state: State) -> State:
    return OrderedDict(state, **{list(state)[-1]: torch.ones(7, 5)})


def matrices(state: State) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.endswith("weight") and v.ndim == 2}


def with_lora(state: State) -> State:
    stems = [key.removesuffix("weight") for key in matrices(state)]
    return OrderedDict(
        state, **{f"{stem}lora_{side}.weight": torch.ones(2, 3) for stem in stems for side in "AB"}
    )


def pruned(state: State) -> State:
    """As `torch.nn.utils.prune` leaves it, with masks that keep all."""
    found = state
    for key, value in matrices(state).items():
        found = without(found, key)
        found |= {f"{key}_orig": value + 1, f"{key}_mask": torch.ones_like(value)}
    return found


def spectral(state: State) -> State:
    found = state
    for key, value in matrices(state).items():
        found = without(found, key)
        found |= {f"{key}_orig": value, f"{key}_u": torch.ones(len(value))}
    return found


def without(state: State, key: str) -> State:
    return OrderedDict((name, value) for name, value in state.items() if name != key)


def beside(state: State, end: str, value: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return OrderedDict(state, **{key + end: value(t) for key, t in matrices(state).items()})


PROFILED = {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
SPOILS.of_state("the first key less", partial(part, start=1, stop=None), "any")
SPOILS.of_state("the last key less", partial(part, start=None, stop=-1), "any")
SPOILS.of_state("one key more", lambda state: OrderedDict(state, more=torch.ones(2, 2)), "any")
SPOILS.of_state("profiling", lambda state: OrderedDict(state, **PROFILED), "any")
SPOILS.of_state("another head", with_other_head, "any")
SPOILS.of_state("LoRA", with_lora, "wrong keys")
SPOILS.of_state("pruned", pruned, "wrong keys")
SPOILS.of_state("spectral", spectral, "wrong keys")
SPOILS.of_state("masks beside", partial(beside, end="_mask", value=torch.zeros_like), "wrong keys")
SPOILS.of_state(
    "scales", partial(beside, end="_scale_inv", value=lambda t: torch.ones(1, 1)), "wrong keys"
)

# --- containers


def archive_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(records: Iterable[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("model.pth")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def rootless(data: bytes) -> bytes:
    return zip_of((name.partition("/")[2], record) for name, record in archive_of(data).items())


def flipped(data: bytes) -> bytes:
    """One bit of a tensor."""
    at = data.index(b"data/0") + 200
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


@SPOILS("legacy")
def legacy(model: nn.Module, path: Path) -> str:
    torch.save(state_of(model), path, _use_new_zipfile_serialization=False)
    return "right"


@SPOILS("unpacked")
def unpacked(model: nn.Module, path: Path) -> str:
    with zipfile.ZipFile(io.BytesIO(saved(state_of(model)))) as archive:
        archive.extractall(path)
    return "right"


@SPOILS("safetensors")
def in_safetensors(model: nn.Module, path: Path) -> str:
    state = {
        k: v.clone().contiguous() for k, v in state_of(model).items() if isinstance(v, torch.Tensor)
    }
    if any(v.is_complex() for v in state.values()) or len(state) < len(state_of(model)):
        torch.save(state_of(model), path)
    else:
        safetensors.torch.save_file(state, path)
    return "right"


@SPOILS("shards")
def in_shards(model: nn.Module, path: Path) -> str:
    path.mkdir()
    state = prefixed(state_of(model), "model.")
    where: dict[str, str] = {}
    for number, part in enumerate((list(state)[::2], list(state)[1::2])):
        name = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save({key: state[key] for key in part}, path / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "right"


def zipped_again(data: bytes) -> bytes:
    return zip_of(archive_of(data).items(), zipfile.ZIP_DEFLATED)


def of_macos(data: bytes) -> bytes:
    return zip_of([*archive_of(data).items(), ("__MACOSX/._data.pkl", b"x")])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "tar around": tar_of,
    "zipped again": zipped_again,
    "__MACOSX": of_macos,
    "no root folder": rootless,
}
for each, pack in PACKED.items():
    SPOILS.of_bytes(each, pack)
SPOILS.of_bytes("a zip around", lambda data: zip_of([("model.pth", data)]), "any")
SPOILS.of_bytes("cut in half", lambda data: data[: len(data) // 2], "wrong")
SPOILS.of_bytes("cut at its end", lambda data: data[:-30], "wrong")
SPOILS.of_bytes("a bit flipped", flipped, "damaged")
SPOILS.of_bytes("two saves", lambda data: data + saved({"other": torch.ones(3)}), "any")


@SPOILS("dangerous beside")
def dangerous_beside(model: nn.Module, path: Path) -> str:
    torch.save({"model": state_of(model), "hook": Called(print, "never")}, path)
    return "right"


class Called:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def combined(name: str, around: str, pack: str) -> Spoil:
    """A spoil of three: renamed keys, something around them, in another container."""

    def spoil(model: nn.Module, path: Path) -> str:
        path.write_bytes(PACKED[pack](saved(AROUND[around](RENAMED[name](state_of(model))))))
        return "right"

    return spoil


for three in product(RENAMED, AROUND, PACKED):
    SPOILS(", ".join(three))(combined(*three))


def removed(path: Path) -> None:
    """Remove a file or a folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)

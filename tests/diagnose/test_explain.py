"""Error texts, most of them made here by the library that prints them."""

import email.message
import importlib.util
import io
import json
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import traceback
import urllib.error
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader

from ckptfix.diagnose.explain import as_markdown, explain, places
from ckptfix.known_errors import KNOWN, Known

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
PASTED = [
    (code, text.rstrip())
    for block in Path(__file__).with_name("pasted.txt").read_text("utf-8").split("\n==== ")[1:]
    for code, _, text in [block.partition("\n")]
]
TEXTS = [(code, text) for code, text in PASTED if code != "nothing"]
NOT_KNOWN = [text for code, text in PASTED if code == "nothing"]


def load(data: bytes, **options) -> Callable[[], object]:
    return lambda: torch.load(io.BytesIO(data), **options)


def saved(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def take(model: nn.Module, weights: object) -> Callable[[], object]:
    return lambda: model.load_state_dict(weights)  # type: ignore[arg-type]


class Gone:
    """Pickled under a module that is not there when it is loaded."""


def of_missing_module() -> bytes:
    data = saved({"x": Gone()}, _use_new_zipfile_serialization=False)
    name = Gone.__module__.encode()
    return data.replace(name, b"z" * len(name))


LINEAR = nn.Linear(2, 2)
WRAPPED = {f"module.{key}": value for key, value in LINEAR.state_dict().items()}
COMPILED = {f"_orig_mod.{key}": value for key, value in LINEAR.state_dict().items()}
SHARDED = {f"_fsdp_wrapped_module.{key}": value for key, value in LINEAR.state_dict().items()}
ZIP = saved(LINEAR.state_dict())
LEGACY = saved(LINEAR.state_dict(), _use_new_zipfile_serialization=False)
SHARED = torch.ones(2, 2)


def with_tag(tag: str) -> bytes:
    """A legacy file whose storages carry another device tag of the same length as `cpu`."""
    return LEGACY.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00" + tag.encode())


def without_storage() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if "/data/0" not in name:
                new.writestr(name, old.read(name))
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(LINEAR, torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def of_missing_class() -> bytes:
    data = saved({"x": Gone()}, _use_new_zipfile_serialization=False)
    return data.replace(b"Gone", b"None")


def in_a_process(code: str) -> Callable[[], object]:
    """What leaves marks on a process: the error that a program of its own ends with."""

    def fails() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    return fails


OLD_TAR = r"""
import tarfile, tempfile, torch
path = tempfile.mkdtemp() + "/old.tar"
with tarfile.open(path, "w") as archive:
    archive.addfile(tarfile.TarInfo("storages"))
torch.load(path, weights_only=True)
"""
ONE_DEVICE = r"""
import io, sys, types, torch
torch.utils.rename_privateuse1_backend("npu")
module = types.ModuleType("torch.npu")
module.is_available, module.device_count = lambda: True, lambda: 1
module._utils = types.SimpleNamespace(_get_device_index=lambda device, optional: 3)
torch._register_device_module("npu", module)
data = io.BytesIO()
torch.save({"w": torch.ones(2)}, data, _use_new_zipfile_serialization=False)
data = data.getvalue().replace(b"X\x03\x00\x00\x00cpu", b"X\x05\x00\x00\x00npu:3")
torch.load(io.BytesIO(data))
"""
FULL_DISK = r"""
import resource, signal, tempfile, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
torch.save({"w": torch.ones(1 << 18)}, tempfile.mkdtemp() + "/full.pt")
"""

BERT = """
import tempfile, torch, safetensors.torch
from transformers import BertConfig, BertModel
sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
folder = tempfile.mkdtemp()
config.save_pretrained(folder)
{save}
BertModel.from_pretrained(folder)
"""
SAVE = "safetensors.torch.save_file(BertModel(config).state_dict(), folder + '/model.safetensors'"
LIGHTNING = """
import tempfile, torch, lightning
class Net(lightning.LightningModule):
    pass
path = tempfile.mkdtemp() + "/in.ckpt"
torch.save({"w": torch.ones(2)}, path)
Net.load_from_checkpoint(path)
"""
WIDER = """
wider = BertConfig(**{**sizes, "hidden_size": 16}, num_hidden_layers=1, num_attention_heads=1)
BertModel(wider).save_pretrained(folder)
config.save_pretrained(folder)
"""
DEEPSPEED = """
import os, tempfile, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
folder = tempfile.mkdtemp()
os.makedirs(folder + "/step")
open(folder + "/latest", "w").write("step")
torch.save({"w": torch.ones(2)}, folder + "/step/mp_rank_00_model_states.pt")
torch.save({"w": torch.ones(2)}, folder + "/step/zero_pp_rank_0_mp_rank_00_optim_states.pt")
get_fp32_state_dict_from_zero_checkpoint(folder)
"""
LIBRARIES = {
    "no metadata": ("missing-metadata", "transformers", BERT.format(save=f"{SAVE})")),
    "other metadata": (
        "missing-metadata",
        "transformers",
        BERT.format(save=f"{SAVE}, metadata={{'format': 'other'}})"),
    ),
    "no checkpoint": (
        "transformers-unreadable",
        "transformers",
        BERT.format(save="open(folder + '/pytorch_model.bin', 'w').write('<html>')"),
    ),
    "no Lightning checkpoint": ("not-lightning", "lightning", LIGHTNING),
    "no DeepSpeed checkpoint": ("deepspeed-keys", "deepspeed", DEEPSPEED),
    "other sizes": (
        "shape-mismatch",
        "transformers",
        BERT.format(save=WIDER),
    ),
}
"""Errors of libraries that ckptfix does not need: code, library, and what makes it raise."""


def without(*names: str) -> bytes:
    """A torch zip that was packed again without some of its records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ZIP)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith(names):
                new.writestr(name, old.read(name))
    return buffer.getvalue()


def packed(*names: str) -> bytes:
    """A tar archive of empty files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


def damaged_zip() -> bytes:
    data = bytearray(ZIP)
    at = data.index(b"archive/data/0") + 200
    data[at] ^= 1
    return bytes(data)


def with_size(size: int) -> bytes:
    """A legacy file in which the size of the first storage is another one."""
    tensors = LEGACY.rindex((4).to_bytes(8, "little"))
    return LEGACY[:tensors] + size.to_bytes(8, "little", signed=True) + LEGACY[tensors + 8 :]


def pair(rename: Callable[[str], str], model: nn.Module = LINEAR) -> Callable[[], object]:
    """A model that is given its own weights under other names."""
    return take(model, {rename(key): value for key, value in LINEAR.state_dict().items()})


class Keeps(nn.Module):
    """A model that keeps a layer under a name."""

    def __init__(self, name: str, layer: nn.Module = LINEAR) -> None:
        super().__init__()
        self.add_module(name, layer)


EMPTY = {key: torch.ones(0) for key in LINEAR.state_dict()}
META = nn.Linear(2, 2, device="meta")


def on_disk(data: bytes) -> Callable[[], object]:
    """What `torch.load` says of a file, from which it reads otherwise than from a stream."""

    def fails() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pt"
            path.write_bytes(data)
            torch.load(path, weights_only=False)

    return fails


def uncounted() -> dict[str, torch.Tensor]:
    weights = nn.Sequential(nn.BatchNorm2d(2)).state_dict()
    del weights["0.num_batches_tracked"]
    return weights


def partitioned() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(0))
    return model


def warned(does: Callable[[], object]) -> object:
    """What is only warned of, as the error that it is when warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return does()


def record(name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(ZIP)) as archive:
        return archive.read(f"archive/{name}")


def of_no_tensor() -> object:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        safetensors.torch.save_file({"a": torch.ones(2)}, path)
        with safetensors.safe_open(path, "pt") as opened:
            return opened.get_tensor("b")


class Unseekable:
    """A stream as of a download."""

    def read(self, *_: int) -> bytes:
        return b""

    readline = read


REAL: dict[str, Callable[[], object]] = {
    "device-cuda": lambda: torch.load(FIXTURES / "cuda.pt"),
    "prefix-module": take(LINEAR, WRAPPED),
    "prefix-missing": take(nn.DataParallel(nn.Linear(2, 2)), LINEAR.state_dict()),
    "prefix-compile": take(LINEAR, COMPILED),
    "prefix-fsdp": take(LINEAR, SHARDED),
    "shape-mismatch": take(nn.Linear(3, 2), LINEAR.state_dict()),
    "keys-differ": take(LINEAR, {"head.weight": torch.ones(1)}),
    "one-rank": lambda: torch.load(
        FIXTURES / "pieces" / "fsdp1_sharded_True_rank_0.pt", weights_only=False
    ),
    "blocked-globals": load(saved({"x": Gone()})),
    "missing-module": load(of_missing_module(), weights_only=False),
    "windows-path": pathlib.WindowsPath if os.name == "posix" else pathlib.PosixPath,
    "missing-class": load(of_missing_class(), weights_only=False),
    "weights-only-torchscript": load(scripted(), weights_only=True),
    "device-index": in_a_process(ONE_DEVICE),
    "write-failed": in_a_process(FULL_DISK),
    "weights-only-tar": in_a_process(OLD_TAR),
    "device-other": load(with_tag("npu")),
    "zip-damaged": load(without_storage()),
    "zip-truncated": load(ZIP[: len(ZIP) // 2]),
    "lfs-pointer": load(b"version https://git-lfs.github.com/spec/v1\n", weights_only=False),
    "html": load(b"<!doctype html><html>", weights_only=False),
    "not-a-pickle": load(b"\xc0\xff\xee", weights_only=False),
    "truncated": load(LEGACY[:-4], weights_only=False),
    "empty": load(b"", weights_only=False),
    "pickle-damaged": lambda: pickle.loads(b"R."),
    "safetensors-header": lambda: safetensors.torch.load(ZIP),
    "safetensors-truncated": lambda: safetensors.torch.load(
        safetensors.torch.save({"a": torch.ones(9)})[:-1]
    ),
    "shared-memory": lambda: safetensors.torch.save_file({"a": SHARED, "b": SHARED}, "never"),
    "non-contiguous": lambda: safetensors.torch.save({"a": torch.ones(2, 3).t()}),
    "mmap-legacy": lambda: torch.load(FIXTURES / "legacy.pt", mmap=True),
    "not-a-model": lambda: LINEAR.state_dict().eval(),  # type: ignore[attr-defined]
    "not-a-state-dict": take(LINEAR, LINEAR),
    "optimizer-groups": lambda: torch.optim.SGD(
        nn.Sequential(LINEAR, LINEAR).parameters(), 1
    ).load_state_dict(torch.optim.SGD([torch.ones(1)], 1).state_dict()),
    "nested-state-dict": take(
        nn.DataParallel(nn.Linear(2, 2)),
        {"state_dict": LINEAR.state_dict(), "best_prec1": 0.5, "epoch": 3},
    ),
    "prefix-surplus": pair("model.{}".format),
    "prefix-lacking": pair(str, Keeps("backbone")),
    "prefix-replaced": pair("encoder.{}".format, Keeps("backbone")),
    "averaged-model": take(LINEAR, torch.optim.swa_utils.AveragedModel(LINEAR).state_dict()),
    "another-head": pair("fc.{}".format, Keeps("classifier")),
    "lora-keys": take(LINEAR, {"lin.lora_A.weight": SHARED, "lin.lora_B.weight": SHARED}),
    "quantized-keys": take(LINEAR, {"0.qweight": SHARED, "0.scales": SHARED}),
    "changed-names": lambda: nn.utils.weight_norm(nn.Linear(2, 2)).load_state_dict(
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).state_dict()
    ),
    "leftover-keys": take(LINEAR, {**LINEAR.state_dict(), "emb.position_ids": SHARED}),
    "missing-counters": take(nn.Sequential(nn.BatchNorm2d(2)), uncounted()),
    "placeholders": take(LINEAR, EMPTY),
    "model-partitioned": take(partitioned(), LINEAR.state_dict()),
    "pickle-protocol": load(saved({"x": SHARED}, pickle_protocol=4)),
    "two-devices": lambda: LINEAR(torch.ones(1, 2, device="meta")),
    "meta-tensors": lambda: META.to("cpu"),
    "copy-to-meta": lambda: warned(lambda: META.load_state_dict(LINEAR.state_dict())),
    "kind-differs": take(LINEAR, {"weight": SHARED.to_sparse(), "bias": SHARED[0]}),
    "value-not-a-tensor": take(LINEAR, {"weight": np.ones((2, 2)), "bias": SHARED[0]}),
    "uninitialized-model": lambda: nn.LazyLinear(2).weight.numel(),
    "quantized-by-bitsandbytes": lambda: nn.Parameter(torch.ones(2, dtype=torch.int8)),
    "running-stats": lambda: nn.InstanceNorm2d(2).load_state_dict(
        {"running_mean": SHARED[0], "running_var": SHARED[0]}
    ),
    "missing-counter": lambda: LINEAR.state_dict()["bn1.num_batches_tracked"],
    "key-asked-for": lambda: LINEAR.state_dict()["conv1.weight"],
    "entry-absent": lambda: LINEAR.state_dict()["state_dict"],
    "not-basicsr": lambda: LINEAR.state_dict()["params_ema"],
    "cannot-pickle": lambda: torch.save(lambda: 0, io.BytesIO()),
    "only-tensors-in-safetensors": lambda: safetensors.torch.save([SHARED]),  # type: ignore[arg-type]
    "save-folder-missing": lambda: torch.save(SHARED, "no/such/folder/model.pt"),
    "not-torchscript": lambda: torch.jit.load(io.BytesIO(ZIP)),
    "no-data-pickle": load(without("data.pkl")),
    "no-version-record": load(without("version", "byteorder")),
    "tar-member-missing": on_disk(packed("model.bin")),
    "written-by-several": on_disk(with_size(-5)),
    "safetensors-no-tensor": of_no_tensor,
    "numpy-file": lambda: np.load(io.BytesIO(pickle.dumps({"w": 1}))),
    "python-2": lambda: pickle.loads(b"U\x02\xb5\xb6."),
    "opened-as-text": lambda: b"PK\x03\x04\x8d".decode("cp1252"),
    "torch-file-in-pickle": lambda: pickle.loads(record("data.pkl")),
    "not-torch-pickle": load(pickle.dumps({"w": 1}), weights_only=False),
    "newer-rebuild": load(
        LEGACY.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), weights_only=False
    ),
    "path-not-loaded": take(LINEAR, "model.pt"),
    "saved-object": take(LINEAR, LINEAR.state_dict),
    "dict-of-numpy": take(LINEAR, (LINEAR.state_dict(), 3)),
    "wrapped-in-data-parallel": lambda: nn.DataParallel(LINEAR).weight,
    "seek-on-stream": lambda: torch.load(Unseekable()),  # type: ignore[arg-type]
    "dcp-folder": lambda: state_dict_loader.load({"w": SHARED}, checkpoint_id="no/such/folder"),
    "no-such-file": lambda: torch.load("no/such/model.pt"),
    "is-a-folder": lambda: torch.load(FIXTURES),
    "numpy-bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16).numpy(),
    "dtype-in-kernel": lambda: LINEAR(torch.ones(1, 2, dtype=torch.float64)),
    "shapes-in-forward": lambda: LINEAR(torch.ones(1, 3)),
    "kernel-failed": lambda: torch.ones(2).cuda(),
    "memory": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "download-failed": lambda: (_ for _ in ()).throw(
        urllib.error.HTTPError("https://x", 403, "Forbidden", email.message.Message(), None)
    ),
}


TODAY: dict[str, tuple[str, Callable[[], object]]] = {
    "a pointer": ("lfs-pointer", load(b"version https://git-lfs.github.com/spec/v1\n")),
    "a page": ("html", load(b"<!doctype html><html>")),
    "an answer": ("not-a-pickle", load(b'{"error": "Repository not found"}')),
    "a plain pickle": ("not-torch-pickle", load(pickle.dumps({"w": 1}), weights_only=False)),
}
"""What torch says today of files that earlier versions had other words for."""

EARLIER = {
    "invalid device ordinal": "device-index",
    "KeyError: 'unexpected key \"module.conv1.weight\" in state_dict'": "prefix-module",
    "KeyError: 'unexpected key \"head.weight\" in state_dict'": "keys-differ",
    "KeyError: 'missing keys in state_dict: \"{'fc.bias'}\"'": "keys-differ",
    "While copying the parameter named fc.weight, whose dimensions in the model are torch.Size([2])"
    " and whose dimensions in the checkpoint are torch.Size([3]).": "shape-mismatch",
    "size mismatch for fc.weight: copying a param of torch.Size([2]) from checkpoint, where the "
    "shape is torch.Size([3]) in current model.": "shape-mismatch",
    "_pickle.UnpicklingError: Weights only load failed. Re-running `torch.load` with `weights_only`"
    " set to `False` will likely succeed.\n WeightsUnpickler error: Unsupported class x.Y": (
        "blocked-globals"
    ),
    "ImportError: No module named models.resnet": "missing-module",
    "AttributeError: 'module' object has no attribute 'Net'": "missing-class",
    "RuntimeError: unexpected EOF. The file might be corrupted.": "truncated",
    "RuntimeError: [enforce fail at inline_container.cc:143] . PytorchStreamReader failed reading "
    "zip archive: failed finding central directory": "zip-truncated",
    "RuntimeError: PytorchStreamWriter failed writing file data/3: file write failed": (
        "write-failed"
    ),
    "RuntimeError: version_number <= kMaxSupportedFileFormatVersion INTERNAL ASSERT FAILED. "
    "Attempted to read a PyTorch file with version 3, but the maximum supported version for reading"
    " is 2. Your PyTorch installation may be too old.": "torch-too-old",
    "Some weights of BertModel were not initialized from the model checkpoint at x and are newly "
    "initialized: ['pooler.dense.bias']": "keys-differ",
    "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details"
    " look at the above report!": "shape-mismatch",
    "RuntimeError: The weights trying to be saved contained shared tensors [{'a', 'b'}] that are "
    "mismatching the transformers base configuration.": "shared-memory",
}
"""What earlier versions of torch say, and transformers."""


@pytest.mark.parametrize("what", TODAY)
def test_files_that_are_something_else_are_known_by_what_torch_says_today(what: str) -> None:
    code, fails = TODAY[what]
    assert [row.known.code for row in explain(printed(fails))] == [code]


@pytest.mark.parametrize("text", EARLIER)
def test_the_words_of_earlier_versions_are_known(text: str) -> None:
    assert [row.known.code for row in explain(text)] == [EARLIER[text]]


def printed(fails: Callable[[], object]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fails()
    except BaseException:  # noqa: BLE001 - every kind is wanted
        return traceback.format_exc()
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_error_of_another_library_is_known_where_it_is_installed(name: str) -> None:
    code, library, script = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    if not ran.returncode:
        pytest.skip(f"this {library} loads it")
    known = [match.known.code for match in explain(ran.stderr)]
    assert code in known or (library == "transformers" and known == ["html"])  # from 5 on


@pytest.mark.parametrize("code", REAL)
def test_the_real_error_is_known(code: str) -> None:
    found = explain(printed(REAL[code]))
    assert found[0].known.code == code


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_the_documented_text_is_known(known: Known) -> None:
    assert [row.known.code for row in explain(known.example)] == [known.code]


def test_every_text_is_made_by_its_library_or_was_pasted() -> None:
    elsewhere = {code for code, *_ in LIBRARIES.values()} | {code for code, _ in TEXTS}
    assert {known.code for known in KNOWN} == {*REAL, *elsewhere, *EARLIER.values()}


@pytest.mark.parametrize(("code", "text"), TEXTS)
def test_what_people_paste_is_known(code: str, text: str) -> None:
    assert [row.known.code for row in explain(text)] == [code]


@pytest.mark.parametrize("text", NOT_KNOWN)
def test_nothing_is_said_of_what_has_no_error_of_a_checkpoint(text: str) -> None:
    assert explain(text) == []


@pytest.mark.parametrize("width", [60, 79, 100])
@pytest.mark.parametrize(("code", "text"), TEXTS)
def test_lines_may_be_broken_anywhere(code: str, text: str, width: int) -> None:
    """As terminals and web pages do it; a table is no table then."""
    if "LOAD REPORT" not in text:
        wrapped = "\n".join(
            "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))
            for line in text.split("\n")
        )
        assert [row.known.code for row in explain(wrapped)][:1] == [code]


def command_of(text: str) -> str:
    return str(explain(text)[0].cure)


@pytest.mark.parametrize(
    ("missing", "unexpected", "command"),
    [
        (["a.w"], ["module.a.w"], "ckptfix strip-prefix FILE OUT"),
        (["a.w"], ["net.module.a.w"], "ckptfix strip-prefix FILE OUT --prefix net.module."),
        (["a.w", "b.w"], ["m.a.w", "m.b.w"], "ckptfix strip-prefix FILE OUT --prefix m."),
        (["m.n.a.w"], ["a.w"], "ckptfix add-prefix FILE OUT --prefix m.n."),
        (["module.a.w"], ["a.w"], "ckptfix add-prefix FILE OUT"),
        (["x.a.w"], ["y.z.a.w"], r"ckptfix rename FILE OUT --sub '^y\.z\.' x."),
        (["a.w", "b.w"], ["c.w", "d.w"], "ckptfix fix FILE OUT --model M"),
        (["a.w"], ["net", "epoch"], "ckptfix convert FILE OUT --weights-only --select net"),
        (
            ["a.w"],
            ["generator", "epoch"],
            "ckptfix convert FILE OUT --weights-only --select generator",
        ),
    ],
)
def test_the_keys_that_a_text_names_say_which_rule_fits(
    missing: list[str], unexpected: list[str], command: str
) -> None:
    """The command is of the rule under which the keys of the text become those of the model."""
    ours, theirs = ({key: torch.ones(1) for key in keys} for keys in (missing, unexpected))
    model = nn.Module()
    for key in ours:
        _put(model, key)
    assert command_of(printed(take(model, theirs))) == command


def _put(module: nn.Module, key: str) -> None:
    *path, name = key.split(".")
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(name, nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("count", [1, 3, 400])
def test_the_command_of_a_prefix_repairs_the_file(tmp_path: Path, count: int) -> None:
    """The text of `load_state_dict`, then the command as it is said: then it loads."""
    model = nn.Module()
    for number in range(count):
        _put(model, f"layers.{number}.weight")
    weights = {f"student.net.{key}": value for key, value in model.state_dict().items()}
    path = tmp_path / "in.pt"
    torch.save(weights, path)
    text = f"torch.load('{path}')\n" + printed(take(model, weights))
    command = explain(text)[0].command
    assert command is not None
    subprocess.run([sys.executable, "-m", *shlex.split(str(command))], check=True)
    model.load_state_dict(torch.load(tmp_path / "in.fixed.pt"))


def test_what_was_seen_is_said() -> None:
    text = printed(take(LINEAR, WRAPPED))
    assert "2 unexpected keys" in explain(text)[0].cause
    assert "module.weight" in explain(text)[0].cause


def test_the_code_of_a_traceback_says_nothing() -> None:
    text = """Traceback (most recent call last):
  File "a.py", line 3, in <module>
    raise RuntimeError("PytorchStreamReader failed locating file") if x else EOFError("Ran out")
KeyError: 'img'
"""
    assert explain(text) == []


def test_an_error_is_told_by_all_processes_and_once() -> None:
    lines = printed(REAL["prefix-module"]).splitlines()
    text = "\n".join(f"[rank{rank}]: {line}" for rank in range(4) for line in lines)
    assert [row.known.code for row in explain(text)] == ["prefix-module"]


def test_the_last_error_of_a_log_is_told_first() -> None:
    text = f"{printed(REAL['empty'])}{printed(REAL['device-cuda'])}"
    assert [row.known.code for row in explain(text)] == ["device-cuda", "empty"]


MEGABYTE = 1 << 20
REPEATED = {
    "words": "a.",
    "slashes": "/",
    "letters": "x",
    "extensions": ".pt",
    "empty lines": "\n",
    "spaces": " ",
    "lines of a traceback": ' File "x.pt", line 3 x.pt\n',
    "no end of such a line": ' File "',
    "modules": "torch.a.pt ",
    "keys": 'Missing key(s) in state_dict: "module.',
    "unexpected keys": "Unexpected key(s) in state_dict: ",
    "weights only": "Weights only load failed ",
    "paragraphs": "invalid load key, '\n\n",
}
"""Texts of which a megabyte is never done where the work grows with its square."""


@pytest.mark.parametrize("what", REPEATED)
def test_whatever_a_log_repeats_it_is_read_once(what: str) -> None:
    text = REPEATED[what]
    found = explain(text * (MEGABYTE // len(text)))
    assert [row.known.code for row in found] == [row.known.code for row in explain(text * 3)]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_an_error_that_is_repeated_or_begun_again_and_again_is_looked_at_once(known: Known) -> None:
    assert [row.known.code for row in explain(f"{known.example}\n" * 5000)][-1:] == [known.code]
    for says in known.says:
        for part in range(1, 9):
            begun = says[: max(len(says) * part // 8, 1)].partition("…")[0]
            for text in (begun, f"{begun}\n", f"{begun}\n\n"):
                log = text * (MEGABYTE // 4 // len(text))
                assert len(list(places(says, log))) <= log.count("\n") + 1


def test_what_follows_in_another_paragraph_is_another_error() -> None:
    text = 'Unexpected key(s) in state_dict: "head.w".\n\nLater: saved "module.head.w"'
    assert [row.known.code for row in explain(text)] == ["keys-differ"]


def test_codes_are_unique() -> None:
    codes = [known.code for known in KNOWN]
    assert sorted(set(codes)) == sorted(codes)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_the_command_exists_and_a_sentence_is_one(known: Known) -> None:
    if isinstance(known.cure, str):
        assert known.cure.endswith(".")
        return
    verb = known.cure.verb
    assert verb is None or (ROOT / "ckptfix" / "cli" / f"{verb.replace('-', '_')}.py").is_file()


def test_the_documentation_is_the_table() -> None:
    assert as_markdown() in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


FAILED = "RuntimeError: unexpected EOF, expected 8 more bytes. The file might be corrupted."


@pytest.mark.parametrize(
    ("text", "file"),
    [
        (
            '  File "/x/train.py", line 3, in <module>\n    torch.load("runs/best.pt")',
            "runs/best.pt",
        ),
        ("OSError: model.safetensors is bad", "model.safetensors"),
        ("Unable to load '/data/a b/pytorch_model.bin'", "/data/a b/pytorch_model.bin"),
        ("nothing here", "FILE"),
        ('  File "/x/a.pth", line 3, in f\n    load(args.ckpt, opt.pth)', "FILE"),
        ("torch.load(args.ckpt)", "FILE"),
        ("torch.load(self.cfg.model.pth)", "FILE"),
        ('  File "/x/a.py", line 3, in f\n    load(f"runs/{name}/best.pt")', "FILE"),
        ('  File "/x/a.py", line 3, in f\n    load(root + "/%s.pt" % name)', "FILE"),
        ('torch.load(f"{out}/epoch_{n}.pth")', "FILE"),
        ("loading a.pt\nloading b.pt", "b.pt"),
        ("loading a.pt\nsaved checkpoint to b.pt", "a.pt"),
        ("=> loading checkpoint 'a.pth.tar'", "a.pth.tar"),
        ("python eval.py --weights=runs/a.pt --data x.yaml", "runs/a.pt"),
        ("reading shard out/model.safetensors.index.json", "out/model.safetensors.index.json"),
        (r"loading C:\\runs\\best.ckpt", r"C:\\runs\\best.ckpt"),
        ("AttributeError in torch.bin and torch.pt", "FILE"),
        ("don't load 'x y.pt' now", "x y.pt"),
    ],
)
def test_the_file_is_the_last_that_was_opened(text: str, file: str) -> None:
    told = explain(f"{text}\n{FAILED}")[0]
    assert told.command is not None
    assert told.command.arguments == (file,)


def test_a_file_that_was_opened_after_an_error_is_not_that_of_the_error() -> None:
    text = f"loading a.pt\n{FAILED}\n\nloading b.pt\n{printed(REAL['empty'])}"
    told = {row.known.code: str(row.command) for row in explain(text)}
    assert told == {"truncated": "ckptfix check a.pt", "empty": "ckptfix inspect b.pt"}


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "explain", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_a_piped_traceback_gives_the_command_with_its_file() -> None:
    text = f'torch.load("ddp.pt")\n{KNOWN[0].example}'
    done = run(text=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ckptfix to-cpu ddp.pt ddp.fixed.pt" in done.stdout


def test_a_log_file_gives_json(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(f"step 1\nstep 2\n{printed(REAL['prefix-module'])}")
    (row,) = json.loads(run(str(tmp_path / "train.log"), "--json").stdout)["found"]
    assert (row["code"], row["severity"], row["advice"]) == ("prefix-module", "error", None)
    assert row["command"] == "ckptfix strip-prefix FILE OUT"


def test_an_unknown_text_is_said_with_exit_code_1() -> None:
    done = run(text="Segmentation fault")
    assert done.returncode == 1
    assert "no error that ckptfix knows" in done.stdout


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(np.random.default_rng(0).bytes(4096))
    assert run(str(tmp_path / "log")).returncode == 1


def test_the_text_may_be_given_as_it_is(tmp_path: Path):
    text = 'RuntimeError: Missing key(s) in state_dict: "w".\n\tUnexpected key(s): "module.w".'
    piped, given = run("--json", text=text), run("--json", text)
    assert (given.returncode, given.stdout) == (0, piped.stdout)
    (tmp_path / "a log.txt").write_text(text)
    in_a_file = json.loads(run("--json", str(tmp_path / "a log.txt")).stdout)
    assert in_a_file == {**json.loads(piped.stdout), "input": str(tmp_path / "a log.txt")}
    gone = run(str(tmp_path / "gone.log"))
    assert gone.returncode == 2
    assert "No such file" in gone.stderr

"""Error texts, most of them made here by the library that prints them."""

import importlib.util
import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ckptfix.diagnose.explain import as_markdown, explain, file_in, places
from ckptfix.known_errors import KNOWN, Known

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"


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
}


TODAY: dict[str, tuple[str, Callable[[], object]]] = {
    "a pointer": ("lfs-pointer", load(b"version https://git-lfs.github.com/spec/v1\n")),
    "a page": ("html", load(b"<!doctype html><html>")),
    "an answer": ("not-a-pickle", load(b'{"error": "Repository not found"}')),
    "a plain pickle": ("pickle-damaged", load(pickle.dumps({"w": 1}), weights_only=False)),
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
    except Exception:  # noqa: BLE001 - every kind is wanted
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


def test_every_text_is_made_by_its_library_or_can_be_no_more() -> None:
    elsewhere = {code for code, *_ in LIBRARIES.values()}
    assert {known.code for known in KNOWN} == {*REAL, *elsewhere, "torch-too-old"}


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
    whole = re.search(known.pattern, known.example)
    assert whole is not None
    for part in range(1, 9):
        begun = whole[0][: max(len(whole[0]) * part // 8, 1)]
        for text in (begun, f"{begun}\n", f"{begun}\n\n"):
            log = text * (MEGABYTE // 4 // len(text))
            assert len(list(places(known, log))) <= log.count("\n\n") + 1


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_no_pattern_looks_through_a_whole_log_at_each_place(known: Known) -> None:
    unbounded = re.compile(r"(?<!\\)(?:\.|\\S|\\D|\\W)[*+]|\{\d*,\}")
    assert unbounded.search(known.pattern) is None
    assert known.then is None or unbounded.search(known.then) is None


def test_what_follows_in_another_paragraph_is_another_error() -> None:
    text = 'Unexpected key(s) in state_dict: "head.w".\n\nLater: saved "module.head.w"'
    assert [row.known.code for row in explain(text)] == ["keys-differ"]


def test_codes_are_unique() -> None:
    codes = [known.code for known in KNOWN]
    assert sorted(set(codes)) == sorted(codes)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.code)
def test_the_command_exists(known: Known) -> None:
    verb = known.command.verb
    assert verb is None or (ROOT / "ckptfix" / "cli" / f"{verb.replace('-', '_')}.py").is_file()


def test_the_documentation_is_the_table() -> None:
    assert as_markdown() in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "file"),
    [
        (
            '  File "/x/train.py", line 3, in <module>\n    torch.load("runs/best.pt")',
            "runs/best.pt",
        ),
        ("OSError: model.safetensors is bad", "model.safetensors"),
        ("Unable to load '/data/a b/pytorch_model.bin'", "b/pytorch_model.bin"),
        ("nothing here", None),
    ],
)
def test_the_file_is_found(text: str, file: str | None) -> None:
    assert file_in(text) == file


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ckptfix", "explain", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_a_piped_traceback_gives_the_command_with_its_file() -> None:
    text = 'torch.load("ddp.pt")\n' + printed(REAL["device-cuda"])
    done = run(text=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ckptfix to-cpu ddp.pt ddp.fixed.pt" in done.stdout


def test_a_log_file_gives_json(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(f"step 1\nstep 2\n{printed(REAL['prefix-module'])}")
    (row,) = json.loads(run(str(tmp_path / "train.log"), "--json").stdout)["found"]
    assert (row["code"], row["severity"]) == ("prefix-module", "error")
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

"""Files that lie where a checkpoint should be: each is recognised by its bytes and named."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptfix import door
from ckptfix.errors import DamagedError, NotACheckpointError, ReadError, UnsupportedError

POINTER = b"""version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


def numpy_file() -> bytes:
    made = io.BytesIO()
    np.save(made, np.arange(3))
    return made.getvalue()


IMPOSTORS: dict[str, tuple[bytes, type[ReadError], str, str]] = {
    "lfs pointer": (POINTER, NotACheckpointError, "git-lfs pointer", "git lfs pull --include"),
    "page": (PAGE, NotACheckpointError, "HTML page", "head -c 400"),
    "page after newlines": (b"\n\r\n  " + PAGE, NotACheckpointError, "HTML page", "head -c"),
    "page in lower case": (b"<html><p>no", NotACheckpointError, "HTML page", "head -c"),
    "XML": (b'<?xml version="1.0"?><Error/>', NotACheckpointError, "HTML page", "head -c"),
    "S3": (
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
        NotACheckpointError, r"answer of a storage service \(AccessDenied\)", "head -c",
    ),
    "JSON": (b'{"error": "Entry not found"}', NotACheckpointError, "JSON text", "head -c"),
    "JSON of many lines": (
        json.dumps({"a": [1, {}]}, indent=2).encode(), NotACheckpointError, "JSON text", "head"
    ),
    "JSON with a brace where safetensors has one": (
        b'{"ab": [{"c": 1}]}', NotACheckpointError, "JSON text", "head -c"
    ),
    "JSON list": (b'[{"a": 1}]', NotACheckpointError, "JSON text", "head -c"),
    "empty": (b"", NotACheckpointError, "is empty", "copy or download it again"),
    "three bytes": (b"abc", ReadError, "only 3 bytes", "copy or download it again"),
    "begins like a zip": (b"PK\x03", ReadError, "only 3 bytes", "copy or download it again"),
    "a zip's first bytes": (
        b"PK\x03\x04", DamagedError, "end record", "copy or download it again"
    ),
    "one zero": (b"\0", DamagedError, "zero bytes", "copy or download it again"),
    "zeros": (bytes(100_000), DamagedError, "zero bytes", "copy or download it again"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), UnsupportedError, "packed with 7z", "7z x"),
    "bzip2": (bz2.compress(b"a" * 99), UnsupportedError, "packed with bzip2", "bzip2 -dc"),
    "xz": (lzma.compress(b"a" * 99), UnsupportedError, "packed with xz", "xz -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), UnsupportedError, "packed with zstd", "zstd -dc"),
    "numpy": (numpy_file(), NotACheckpointError, "a numpy array", ""),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), NotACheckpointError, "an HDF5 file", ""),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x031.9:", NotACheckpointError, "an ONNX model", "onnx"),
    "SavedModel": (b"\x08\x01\x12\xb2\x04\n", NotACheckpointError, "SavedModel", "TensorFlow"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(9), NotACheckpointError, "TensorFlow Lite", ""),
    "ExecuTorch": (b"\x38\0\0\0ET12" + bytes(9), NotACheckpointError, "ExecuTorch", "the model"),
    "Torch7": (
        struct.pack("<3i", 4, 1, 3) + b"V 1" + struct.pack("<i", 13) + b"nn.Sequential",
        NotACheckpointError, "Torch7", "torchfile",
    ),
    "Torch7, a table": (struct.pack("<5i", 3, 1, 2, 2, 6), NotACheckpointError, "Torch7", ""),
    "GGML": (b"lmgg" + bytes(28), NotACheckpointError, "GGML", ""),
    "GGJT": (b"tjgg\x03" + bytes(28), NotACheckpointError, "GGML", ""),
    "Flax": (b"\x81\xa6params\x82\xa5Dense\x81", NotACheckpointError, "MessagePack", "flax"),
    "MXNet": (b"\x12\x01" + bytes(22), NotACheckpointError, "MXNet", ""),
    "Darknet": (struct.pack("<5i", 0, 2, 5, 32013312, 0), NotACheckpointError, "Darknet", ""),
    "MindSpore": (
        b"\n\x2b\n\x0cconv1.weight\x12\x1b\x08\x06\x12\x07Float32", NotACheckpointError,
        "MindSpore", "mindspore.load_checkpoint",
    ),
    "TorchSharp": (
        b"\x02\x0alin.weight\x06\x02\x04\x08" + bytes(128), NotACheckpointError, "TorchSharp", ""
    ),
    "llama2.c": (
        struct.pack("<7i", 288, 768, 6, 6, 6, -32000, 256) + bytes(99), NotACheckpointError,
        "llama2.c", "",
    ),
    "llama2.c of today": (b"24ka\x01" + bytes(99), NotACheckpointError, "llama2.c", ""),
    "iCloud": (
        b"bplist00\xd3\x01\x02\x03\x04\x05\x06]NSURLNameKey", NotACheckpointError, "iCloud", "brctl"
    ),
    "AppleDouble": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", NotACheckpointError, "AppleDouble", "._"),
    "xet": (b"# xet version 0\nfilesize = 9\n", NotACheckpointError, "pointer of git-xet", "xet"),
    "DVC": (b"outs:\n- md5: a304afb96060aad9\n  size: 9\n", NotACheckpointError, "DVC", "dvc pull"),
    "annex": (b"/annex/objects/SHA256E-s9--ab.pt\n", NotACheckpointError, "git-annex", "annex get"),
    "annex, a link": (
        b"../.git/annex/objects/Xz/4q/SHA256E-s9--ab.pt", NotACheckpointError, "git-annex", "annex"
    ),
    "base64": (
        base64.encodebytes(b"PK\x03\x04" + bytes(range(200))), NotACheckpointError, "in base64",
        "base64 -d",
    ),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(9), NotACheckpointError, "AOTInductor", "model"),
    "zlib of joblib": (zlib.compress(bytes(99)), NotACheckpointError, "joblib", "joblib.load"),
    "joblib": (
        b"\x80\x04\x8c\x13joblib.numpy_pickle\x94\x8c\x11NumpyArrayWrapper.",
        NotACheckpointError, "joblib", "joblib.load",
    ),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(50), UnsupportedError, "packed with lz4", "lz4 -dc"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(99), NotACheckpointError, "a GGUF file", ""),
    "random": (random.Random(1).randbytes(5000), NotACheckpointError, "not a checkpoint", "file "),
    "text": (b"import torch\n\nprint(torch)\n", NotACheckpointError, "not a checkpoint", "file "),
}  # fmt: skip


LITTLE = {"empty", "three bytes", "begins like a zip", "random", "text"}
"""What says nothing of its kind."""


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("case", IMPOSTORS)
def test_impostors_are_named_with_a_cure(case: str, name: str, tmp_path: Path) -> None:
    data, error, words, hint = IMPOSTORS[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(error, match=words) as caught:
        door.read(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    assert hint in str(caught.value.hint)


SOUND = [case for case, (_, error, *_) in IMPOSTORS.items() if error is not DamagedError]


@pytest.mark.parametrize("case", [case for case in SOUND if case not in LITTLE])
def test_recover_refuses_them_by_the_same_name(case: str, tmp_path: Path) -> None:
    data, _, words, _ = IMPOSTORS[case]
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(ReadError, match=words):
        door.salvage(path)


def saved(**options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(nn.Linear(40, 40).state_dict(), made, **options)
    return made.getvalue()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_file_that_was_transferred_as_text_is_called_that(container: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    data = saved(_use_new_zipfile_serialization=container == "zip")
    assert data.count(b"\n") > data.count(b"\r\n")
    path.write_bytes(data.replace(b"\n", b"\r\n"))
    with pytest.raises(DamagedError, match="transferred as a text") as caught:
        door.read(path)
    assert "binary" in str(caught.value.hint)


def test_other_damage_is_not_called_a_transfer(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(saved()[:-900])
    with pytest.raises(DamagedError) as caught:
        door.read(path)
    assert "text" not in caught.value.message


def test_the_pickle_of_an_archive_by_itself_is_called_that(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        (tmp_path / "data.pkl").write_bytes(archive.read("archive/data.pkl"))
    for read in (door.read, door.salvage):
        with pytest.raises(NotACheckpointError, match="by itself: the tensors lie"):
            read(tmp_path / "data.pkl")


def test_what_is_inside_a_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt.gz"
    path.write_bytes(gzip.compress(PAGE))
    with pytest.raises(NotACheckpointError, match="HTML page"):
        door.read(path)


def test_hints_can_be_pasted_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "my model; rm -rf.pt"
    path.write_bytes(POINTER)
    with pytest.raises(NotACheckpointError) as caught:
        door.read(path)
    assert f"'{path}'" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["x.pt", "-x", "my model.gz.pt", "x.unpacked"])
@pytest.mark.parametrize("packer", ["gzip", "xz", "bzip2", "zstd"])
def test_the_hint_to_unpack_works_for_any_name(
    packer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(packer) is None:
        pytest.skip(f"{packer} is not there")
    monkeypatch.chdir(tmp_path)
    inner = b"PK\x03\x04 what was packed"
    rounds = 2 if packer == "gzip" else 1  # ckptfix unpacks gzip itself, once
    packed = inner
    for _ in range(rounds):
        packed = subprocess.run(
            [packer, "-c"], input=packed, capture_output=True, check=True
        ).stdout
    Path(name).write_bytes(packed)
    Path(f"{name}.unpacked").write_bytes(b"something else")
    with pytest.raises(ReadError) as caught:
        door.read(Path(name))
    assert caught.value.hint is not None
    line = str(caught.value.hint).partition(": ")[2]
    subprocess.run(line, shell=True, check=True)
    found = Path(f"{name}.unpacked1").read_bytes()
    assert (gzip.decompress(found) if packer == "gzip" else found) == inner
    assert Path(f"{name}.unpacked").read_bytes() == b"something else"


@pytest.mark.parametrize("seed", range(200))
def test_random_bytes_give_an_error_and_no_traceback(seed: int, tmp_path: Path) -> None:
    """Half of them behind the first bytes of a container or a pickle."""
    chance = random.Random(seed)
    starts = [b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"(", b"\x1f\x8b\x08\0"]
    path = tmp_path / "x.pt"
    path.write_bytes(chance.choice(starts) + chance.randbytes(chance.randrange(1, 400)))
    with pytest.raises(ReadError) as caught:
        door.read(path)
    assert caught.value.message.startswith(f"{path}: ")

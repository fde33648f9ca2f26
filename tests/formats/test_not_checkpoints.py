"""Files that lie where a checkpoint should be: each is recognised by its bytes and named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

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
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(99), NotACheckpointError, "a GGUF file", ""),
    "random": (random.Random(1).randbytes(5000), NotACheckpointError, "not a checkpoint", "file "),
    "text": (b"import torch\n\nprint(torch)\n", NotACheckpointError, "not a checkpoint", "file "),
}  # fmt: skip


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

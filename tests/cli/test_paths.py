"""Paths: nothing is written over what is read, by whatever name; OUT is where the user pointed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import ckptfix
from ckptfix.bytes.place import unused
from ckptfix.errors import CkptfixError
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, done, unlike

DDP = FIXTURES / "dataparallel.pt"
NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(DDP, tmp_path / "in.pt")
    shutil.copy(FIXTURES / "cpu.pt", tmp_path / "like.pt")
    (tmp_path / "net.py").write_text(NET)
    os.link(tmp_path / "in.pt", tmp_path / "hard.pt")
    (tmp_path / "link.pt").symlink_to("in.pt")
    done("convert", tmp_path / "in.pt", f"{tmp_path}/shards/", "--max-shard-size", "100")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OVER_WHAT_IS_READ = {
    "a page over FILE": ["inspect", "in.pt", "--html", "in.pt", "-f"],
    "a page over another name of FILE": ["inspect", "in.pt", "--html", "hard.pt", "-f"],
    "a page over a link to FILE": ["inspect", "in.pt", "--html", "./link.pt", "-f"],
    "a page over A": ["diff", "in.pt", "like.pt", "--html", "in.pt", "-f"],
    "a page over B": ["diff", "in.pt", "like.pt", "--html", "like.pt", "-f"],
    "a page over a shard": ["inspect", "shards", "--html", "shards/config.json", "-f"],
    "OUT over IN": ["strip-prefix", "in.pt", "in.pt", "-f"],
    "OUT over another name of IN": ["strip-prefix", "in.pt", "hard.pt", "-f"],
    "OUT over what is compared with": ["fix", "in.pt", "like.pt", "--like", "like.pt", "-f"],
    "OUT over the model": [
        "fix", "in.pt", "net.py", "--to", "torch", "--model", "net.py:Net", "-f"
    ],
    "OUT over a shard": ["convert", "shards", "shards/first.safetensors", "-f"],
    "OUT over a shard of an index": [
        "convert", "shards/model.safetensors.index.json", "shards/first.safetensors", "-f"
    ],
    "OUT is the folder in which IN is": ["convert", "in.pt", ".", "-f"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", OVER_WHAT_IS_READ.values(), ids=list(OVER_WHAT_IS_READ))
def test_nothing_is_written_over_what_is_read(arguments: list[str], folder: Path) -> None:
    (folder / "shards" / "config.json").write_text("{}")
    shard = next((folder / "shards").glob("*-00001-*"))
    os.link(shard, folder / "shards" / "first.safetensors")
    before = everything(folder)
    ran = ckptfix_command(*arguments)
    assert ran.returncode == 2, ran.stdout
    assert "input" in ran.stderr
    assert "hint: " in ran.stderr
    assert everything(folder) == before


@pytest.mark.parametrize("verb", ["inspect", "diff"])
def test_a_page_can_be_printed(verb: str, folder: Path) -> None:
    files = ["in.pt"] if verb == "inspect" else ["in.pt", "like.pt"]
    printed = ckptfix_command(verb, *files, "--html", "-")
    assert printed.returncode == (0 if verb == "inspect" else 1)
    ckptfix_command(verb, *files, "--html", "page.html")
    assert printed.stdout == (folder / "page.html").read_text("utf-8")
    assert not Path("-").exists()


# --- links that lead elsewhere


@pytest.fixture
def cache(folder: Path) -> Path:
    """A cache of the Hub: a name in a snapshot is a link to a blob, called by its checksum."""
    (folder / "blobs").mkdir()
    (folder / "snapshots" / "main").mkdir(parents=True)
    shutil.copy(DDP, folder / "blobs" / "0123abcd")
    name = folder / "snapshots" / "main" / "pytorch_model.bin"
    name.symlink_to("../../blobs/0123abcd")
    return name


def test_the_blob_behind_a_link_is_neither_replaced_nor_changed(cache: Path, folder: Path) -> None:
    before = everything(folder)
    replaced = ckptfix_command("convert", "like.pt", cache, "-f")
    assert replaced.returncode == 2
    assert "is a link to" in replaced.stderr
    assert f"give another name for OUT, or remove the link: rm {cache}" in replaced.stderr
    changed = ckptfix_command("strip-prefix", cache, "--in-place")
    assert changed.returncode == 2
    assert "others may use under its name" in changed.stderr
    hint = changed.stderr.split("hint: write a copy: ")[1].splitlines()[0]
    assert everything(folder) == before
    assert ckptfix_command(*hint.split()[1:]).returncode == 0
    with pytest.raises(CkptfixError):
        ckptfix.open(cache).strip_prefix().save_in_place()


def test_a_link_within_its_folder_is_followed(folder: Path) -> None:
    (folder / "latest.pt").symlink_to("step-2.pt")
    shutil.copy(DDP, folder / "step-2.pt")
    done("strip-prefix", "latest.pt", "--in-place")
    assert (folder / "latest.pt").is_symlink()
    assert all(not key.startswith("module.") for key in torch.load(folder / "step-2.pt"))


def test_what_has_another_name_is_not_changed_in_place_and_the_hint_goes_on(folder: Path) -> None:
    ran = ckptfix_command("strip-prefix", "hard.pt", "--in-place")
    assert ran.returncode == 2
    assert "several names (hard links: cp -l, or timm's last and best)" in ran.stderr
    hint = ran.stderr.split("hint: write a copy: ")[1].splitlines()[0]
    assert ckptfix_command(*hint.split()[1:]).returncode == 0


# --- what OUT means


def test_into_a_folder_that_is_there_goes_a_file_under_its_own_name(folder: Path) -> None:
    (folder / "d").mkdir()
    assert done("strip-prefix", "in.pt", "d").startswith("wrote d/in.pt: ")
    assert list((folder / "d").iterdir()) == [folder / "d" / "in.pt"]
    answer = json.loads(done("convert", "in.pt", "d", "--to", "safetensors", "--json"))
    assert answer["output"] == "d/in.safetensors"
    assert ckptfix.open("d/in.safetensors").container == "safetensors"
    again = ckptfix_command("strip-prefix", "in.pt", "d")
    assert (again.returncode, "d/in.pt" in again.stderr) == (2, True)
    ckptfix.open("like.pt").save("d")
    assert unlike(torch.load("d/like.pt"), torch.load("like.pt")) is None


@pytest.mark.parametrize("arguments", [["d/"], ["d", "--to", "shards"], ["new/"]])
def test_a_slash_or_to_means_a_folder_of_shards(arguments: list[str], folder: Path) -> None:
    (folder / "d").mkdir()
    done("convert", "in.pt", *arguments)
    assert (folder / arguments[0] / "model.safetensors").is_file()


def test_a_folder_becomes_a_folder_where_the_name_has_no_extension(folder: Path) -> None:
    (folder / "d").mkdir()
    for source in ("shards", "shards/", "shards/model.safetensors.index.json"):
        for out in ("d", f"new-{source.count('/')}{len(source)}"):
            done("convert", source, out, "-f")
            assert (folder / out / "model.safetensors").is_file()
    done("convert", "shards", "whole.pt")
    assert (folder / "whole.pt").is_file()


def test_the_name_of_torchs_example_is_a_torch_file(folder: Path) -> None:
    done("strip-prefix", "in.pt", "model_best.pth.tar")
    assert unlike(torch.load("model_best.pth.tar"), torch.load("like.pt")) is None
    shutil.copy(DDP, "best.pth.tar")
    os.link("best.pth.tar", "last.pth.tar")
    ran = ckptfix_command("strip-prefix", "last.pth.tar", "--in-place")
    assert "hint: write a copy: ckptfix strip-prefix last.pth.tar last.fixed.pth.tar" in ran.stderr
    os.unlink("best.pth.tar")
    done("strip-prefix", "last.pth.tar", "--in-place")
    ckptfix.open("in.pt").save("LIBRARY.PTH.TAR")
    (folder / "d").mkdir()
    done("convert", "last.pth.tar", "d", "--to", "safetensors")
    assert (folder / "d" / "last.safetensors").is_file()
    for path in ("model_best.pth.tar", "LIBRARY.PTH.TAR"):
        assert "wrong-extension" not in done("inspect", path)


# --- what advice names


def hinted(*arguments: str) -> list[str]:
    """The words of every command that is told, on both streams."""
    ran = ckptfix_command(*arguments)
    lines = (line.partition("ckptfix ")[2] for line in (ran.stdout + ran.stderr).splitlines())
    return [line for line in lines if line]


ADVICE: dict[str, list[str]] = {
    "a finding": ["check", "in.pt"],
    "a finding of shards": ["inspect", "shards"],
    "a copy": ["strip-prefix", "hard.pt", "--in-place"],
    "a repair": ["check", "in.pt", "--like", "like.pt"],
    "what is damaged": ["inspect", "cut.pth.tar"],
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_names_no_output_that_is_there(name: str, folder: Path) -> None:
    (folder / "cut.pth.tar").write_bytes((FIXTURES / "legacy.pt").read_bytes()[:-20])
    for _ in range(3):  # what each command writes is there when the next is asked for
        before = everything(folder)
        told = hinted(*ADVICE[name])
        assert told
        for command in dict.fromkeys(told):
            ran = ckptfix_command(*command.split())
            assert ran.returncode in (0, 1), (command, ran.stderr)
        assert {path: everything(folder)[path] for path in before} == before


def test_advice_names_no_output_where_nothing_can_be_written() -> None:
    if os.access("/sys", os.W_OK):
        pytest.skip("everything can be written to")
    assert unused("/sys/in.fixed", ".pt") == "in.fixed.pt"


def test_what_other_names_of_a_file_are_is_said(folder: Path) -> None:
    os.link("in.pt", "last.pth.tar")
    ran = ckptfix_command("strip-prefix", "last.pth.tar", "--in-place", "--dry-run")
    assert (ran.returncode, "would change: hard.pt, in.pt too" in ran.stderr) == (2, True)
    hint = ran.stderr.split("hint: write a copy: ")[1].splitlines()[0]
    assert hint == "ckptfix strip-prefix last.pth.tar last.fixed.pth.tar"


def test_pth_tar_is_one_extension_in_all_that_is_told(folder: Path) -> None:
    shutil.copy(FIXTURES / "plain.safetensors", "wrong.pth.tar")
    shutil.copy(DDP, "right.pth.tar")
    (folder / "cut.pth.tar").write_bytes(DDP.read_bytes()[:-20])
    assert hinted("inspect", "right.pth.tar") == [
        "strip-prefix right.pth.tar right.stripped.pth.tar"
    ]
    assert "recover cut.pth.tar cut.recovered.pt" in hinted("inspect", "cut.pth.tar")
    shown = ckptfix_command("inspect", "wrong.pth.tar").stdout
    assert "wrong-extension: named .pth.tar, but the bytes are safetensors" in shown
    assert "mv wrong.pth.tar wrong.safetensors" in shown
    error = "Attempting to deserialize object on a CUDA device: load('best.pth.tar')"
    assert "to-cpu best.pth.tar best.fixed.pth.tar" in hinted("explain", error)
    done("strip-prefix", "right.pth.tar", "out.pth.tar")
    done("strip-prefix", "right.pth.tar", "--in-place")
    assert torch.load("right.pth.tar").keys() == torch.load("out.pth.tar").keys()


def test_with_force_the_hint_has_force_too(folder: Path) -> None:
    keys = ("a", "fc.weight")
    torch.save({f"module.{key}": torch.ones(2, 2) for key in keys}, "in2.pt")
    torch.save({"fc.weight": torch.ones(2, 2)}, "like2.pt")
    (folder / "out.pt").write_bytes(b"old")
    (told,) = hinted("strip-prefix", "in2.pt", "out.pt", "-f", "--like", "like2.pt")
    assert ckptfix_command(*told.split()).returncode == 0
    assert list(torch.load("out.pt")) == ["fc.weight"]


@pytest.mark.parametrize("name", ["model.pkl", "model.th", "model.tar"])
def test_explain_names_an_output_that_can_be_written(name: str, folder: Path) -> None:
    shutil.copy(FIXTURES / "cuda.pt", name)
    error = f"Attempting to deserialize object on a CUDA device: load('{name}')"
    (told,) = hinted("explain", error)
    assert ckptfix_command(*told.split()).returncode == 0


@pytest.mark.parametrize("words", [["KeyError", "foo"], ["KeyError"], ["KeyError:", "'a.b'"]])
def test_explain_takes_words_as_they_are(words: list[str], folder: Path) -> None:
    ran = ckptfix_command("explain", *words)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.startswith("no error that ckptfix knows")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_folder_of_an_adapter_opens(kind: str, folder: Path) -> None:
    (folder / "adapter").mkdir()
    done("convert", "like.pt", f"adapter/adapter_model.{kind}")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert ckptfix.load_state_dict("adapter").keys() == torch.load("like.pt").keys()
    done("convert", "adapter", "new/")
    names = {"adapter_model.safetensors", "adapter_config.json"}
    assert {path.name for path in (folder / "new").iterdir()} == names

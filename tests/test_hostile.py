"""Every row of the threat table, in every protocol and container, at every door: nothing runs."""

from __future__ import annotations

import json
import os
import pickletools
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import ckptfix
from ckptfix.errors import DamagedError, ReadError
from tests import hostile
from tests.hostile import CANARY, CONTAINERS, WEIGHTS, Doors, Speller

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PROTOCOLS = range(6)
MEMORY = 64 << 20
SAMPLE = [("zip", 2), ("legacy", 2), ("tar", 0), ("plain", 4), ("torchscript", 5), ("gzip", 1),
          ("shards", 4), ("dcp item", 4), ("dcp metadata", 2)]  # fmt: skip


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    made = Doors()
    yield made
    made.close()


class Trial:
    """One file, put before every door."""

    def __init__(
        self, doors: Doors, folder: Path, data: hostile.Files, tally: Any, said: str
    ) -> None:
        path = folder / "hostile.pt"
        hostile.put(path, data)
        self.found, self.tally, self.said = doors.try_all(path), tally, said
        tally("files tried")
        for name in self.found.get("left", []):
            remove(folder / name)
        self.check()

    def check(self) -> None:
        """What holds for every file: no end but by an exit code, no traceback, no canary."""
        found, said = self.found, (self.said, self.found)
        assert "died" not in found, said
        assert CANARY not in found["left"], said
        assert not any("escaped" in str(answer) for answer in found["library"].values()), said
        for verb in found["verbs"].values():
            assert verb["code"] in (0, 1, 2), said
            assert "Traceback" not in verb["err"], said
            if verb["code"] == 2:
                assert verb["err"].startswith("error: "), said
        assert found["memory"] < MEMORY, said

    def refused(self, code: str) -> None:
        """By every door, with one code, and nothing is left behind."""
        assert set(self.found["library"].values()) == {code}, (self.said, self.found)
        codes = {name: verb["code"] for name, verb in self.found["verbs"].items()}
        checked = codes.pop("check")
        assert set(codes.values()) == {2}, (self.said, self.found)
        assert checked in (1, 2), (self.said, self.found)
        assert self.found["left"] == ["hostile.pt"], (self.said, self.found)
        self.tally(f"refused: {code}")

    def read(self, *, in_a_parameter: bool = False) -> None:
        """By every door; the weights are those that are in it.

        A parameter around something else is refused where it is one of them, and not left out.
        """
        library = self.found["library"]
        assert (library["open"], library["load"]) == (None, None), (self.said, self.found)
        loaded = library["load_state_dict"]
        refused = in_a_parameter and loaded == "unsupported"
        assert loaded == WEIGHTS or refused, (self.said, self.found)
        assert self.found["verbs"]["inspect"]["code"] == 0, (self.said, self.found)
        self.tally("read, inert")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def bodies(speller: Speller) -> Iterator[tuple[str, bytes, str | None]]:
    """Name, opcodes, and the code of the refusal, if they are refused."""
    for name, make in hostile.INERT.items():
        yield name, make(speller), None
    for name, body in hostile.VALUES_KEPT.items():
        yield name, body, None
    for name, (body, code) in hostile.REFUSED.items():
        yield name, body, code


def put_to_every_door(
    container: str, protocol: int, doors: Doors, folder: Path, tally: Any
) -> None:
    speller = Speller(protocol)
    for name, body, code in bodies(speller):
        said = f"{name} in {container}, protocol {protocol}"
        trial = Trial(doors, folder, CONTAINERS[container](speller, body), tally, said)
        code = other_code(container, protocol, name, code)
        if code is None:
            trial.read(in_a_parameter=name == "_rebuild_parameter")
        else:
            trial.refused(code)


def other_code(container: str, protocol: int, name: str, code: str | None) -> str | None:
    """Plain pickles hold storages as pickles; before protocol 2 they might be any text."""
    container = "plain" if container == "dcp metadata" else container
    if container == "plain" and name == "torch.load_from_bytes":
        code = "damaged"
    plain_text = container == "plain" and protocol < 2
    return "not-a-checkpoint" if plain_text and code == "damaged" else code


@pytest.mark.parametrize(("container", "protocol"), SAMPLE)
def test_a_hostile_pickle_is_inert_or_refused(
    container: str, protocol: int, doors: Doors, tmp_path: Path, tally: Any
) -> None:
    put_to_every_door(container, protocol, doors, tmp_path, tally)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_hostile_pickle_is_inert_or_refused(
    container: str, protocol: int, doors: Doors, tmp_path: Path, tally: Any
) -> None:
    put_to_every_door(container, protocol, doors, tmp_path, tally)


@pytest.mark.parametrize("name", hostile.PERSISTENT)
def test_persistent_ids_that_are_not_torchs_are_refused(
    name: str, doors: Doors, tmp_path: Path, tally: Any
) -> None:
    data = hostile.torch_zip(Speller(2), hostile.PERSISTENT[name])
    trial = Trial(doors, tmp_path, data, tally, name)
    assert {verb["code"] for verb in trial.found["verbs"].values()} == {2}
    assert trial.found["left"] == ["hostile.pt"]


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_by_name(
    name: str, doors: Doors, tmp_path: Path, tally: Any
) -> None:
    make, code = hostile.FILES[name]
    Trial(doors, tmp_path, make(), tally, name).refused(code)


def test_a_bomb_that_lies_about_its_size_is_cut_off(
    doors: Doors, tmp_path: Path, tally: Any
) -> None:
    found = Trial(doors, tmp_path, hostile.lying_bomb(), tally, "a bomb that lies").found
    assert (found["library"]["open"], found["library"]["load_state_dict"]) == (None, "damaged")
    (tmp_path / "bomb.pt").write_bytes(hostile.lying_bomb())
    with pytest.raises(DamagedError, match="does not unpack to 12 bytes"):
        ckptfix.open(tmp_path / "bomb.pt").save(tmp_path / "out.pt")


def test_a_few_bytes_that_would_fill_a_disk_are_an_error(doors: Doors, tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    path.write_bytes(hostile.described(hostile.Layout(shape=(1 << 37,), stride=(0,))))
    found = doors.try_all(path)
    converted = found["verbs"]["convert"]
    assert (converted["code"], found["left"]) == (2, ["fixed.pt", "huge.pt"])
    assert (tmp_path / "fixed.pt").stat().st_size < 10_000  # as few bytes as before
    assert "repeats its elements" in converted["err"]
    assert "hint: write a .pt file instead" in converted["err"]


def test_a_sound_file_is_read(doors: Doors, tmp_path: Path, tally: Any) -> None:
    for container, make in CONTAINERS.items():
        for protocol in PROTOCOLS:
            data = make(Speller(protocol), b"N")
            Trial(doors, tmp_path, data, tally, f"{container} {protocol}").read()


@pytest.mark.parametrize("shard", hostile.WEIGHT_MAPS)
def test_an_index_leads_to_no_other_place(shard: str, tmp_path: Path) -> None:
    outside = tmp_path / "evil.safetensors"
    tail = hostile.FILES["safetensors: tail"][0]()
    assert isinstance(tail, bytes)
    outside.write_bytes(tail[:-4])
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    for path in (folder, index):
        with pytest.raises(ReadError):
            ckptfix.open(path)
    outside.rename(folder / "evil.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "evil.safetensors"}}))
    assert ckptfix.open(folder).state_dicts


# --- that these checks can fail


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "subprocess.Popen"])
def test_the_payloads_do_what_they_say_where_they_are_run(
    name: str, protocol: int, tmp_path: Path
) -> None:
    speller = Speller(protocol)
    body = speller.whole(hostile.INERT[name](speller))
    (tmp_path / "payload").write_bytes(body)
    script = "import pickle; pickle.load(open('payload', 'rb'))"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert wait_for(tmp_path / CANARY)


def wait_for(path: Path) -> bool:
    """Popen does not wait for what it starts."""
    listed = "while [ ! -e $0 ]; do sleep 0.05; done"
    return subprocess.run(["timeout", "20", "sh", "-c", listed, path], check=False).returncode == 0


def test_every_opcode_is_in_the_table() -> None:
    seen: set[str] = set()
    for protocol in PROTOCOLS:
        speller = Speller(protocol)
        for _, body, _ in bodies(speller):
            seen |= opcodes_of(speller.whole(speller.dict(evil=body)))
        seen |= opcodes_of(speller.whole(hostile.SOUND.spell(speller)))
    for body in hostile.PERSISTENT.values():
        seen |= opcodes_of(body)
    assert {code.name for code in pickletools.opcodes} - seen == set()


def opcodes_of(data: bytes) -> set[str]:
    """The names of its opcodes, as far as it can be read."""
    found = set()
    try:
        for opcode, _, _ in pickletools.genops(data):
            found.add(opcode.name)
    except ValueError:
        pass
    return found

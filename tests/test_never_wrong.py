"""Never wrong in silence: exit 0 only with what torch's strict load needs, values equal.

Every model of `tests.situations` goes through every spoil and every door: `check`, `fix`,
`strip-prefix`, `to-cpu`, `convert`, and the loaders. The oracle is torch: a model that is built
anew loads strictly what comes out, and has the values of the one that was saved, or those that
torch itself takes from the file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
import zlib
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import ckptfix
from ckptfix.cli import group
from ckptfix.errors import CkptfixError
from tests import situations
from tests.oracles import bits, module_in, unlike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

pytestmark = pytest.mark.filterwarnings("ignore")


def chance(pair: tuple[str, str]) -> int:
    """A number that is the same in every run."""
    return zlib.crc32(repr(pair).encode())


PAIRS = [
    pair
    for pair in product(situations.SPOILS, situations.NAMES)
    if "," not in pair[0] or chance(pair) % 16 == 0
]
SOME = [pair for pair in PAIRS if "," not in pair[0] and chance(pair) % 6 == 0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """`net.py`, imported, so that a whole model can be pickled too."""
    path = tmp_path_factory.mktemp("models") / "net.py"
    path.write_text(situations.MODELS)
    return module_in(path, "never_wrong_models")


def taken(make: Callable[[], nn.Module], state: Any) -> dict[str, Any] | None:
    """What a new model has after torch loaded a state dict into it; None where torch refuses."""
    model = make()
    try:
        if any(getattr(value, "is_meta", False) for value in state.values()):
            return None  # what has no bytes gives the model none
        model.load_state_dict(state, strict=True)
    except Exception:  # noqa: BLE001
        return None
    return dict(model.state_dict())


def by_torch(path: Path) -> Any:
    """What torch makes of a file, a folder of shards, or nothing."""
    try:
        return torch.load(path, weights_only=False, map_location="cpu")
    except Exception:  # noqa: BLE001
        return None


def states(value: Any) -> Iterator[Any]:
    """Everything in a checkpoint that a user might hand to `load_state_dict`."""
    if isinstance(value, nn.Module):
        yield value.state_dict()
    elif isinstance(value, dict):
        yield value
        for child in value.values():
            yield from states(child)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every dense tensor with data in a loaded tree."""
    if isinstance(value, nn.Module):
        yield from tensors(value.state_dict())
    elif isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not value.is_meta and not value.is_quantized:
            yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(value)
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from tensors(child)


def told(value: Any) -> set[tuple[str, tuple[int, ...], bytes]]:
    """The values of tensors, without their names."""
    return {(str(t.dtype), tuple(t.shape), bits(t)) for t in tensors(value)}


class Situation:
    """One file, tried at every door."""

    def __init__(self, model: Callable[[], nn.Module], reference: str, path: Path) -> None:
        self.make, self.reference, self.path = model, reference, path
        self.faults: list[str] = []
        self.verdicts: list[str] = []

    def judge(self, outcome: str, *truths: dict[str, Any]) -> None:
        loaded = by_torch(self.path)
        mine = [found for state in states(loaded) if (found := taken(self.make, state)) is not None]
        self.allowed = (
            [] if outcome == "wrong" else mine if outcome == "damaged" else [*mine, *truths]
        )
        self.outcome, self.there = outcome, told(loaded)
        plain = bool(mine)
        self.check(plain)
        for name in ("fixed.pt", "fixed.safetensors"):
            self.writes("fix", name, plain)
        self.writes("strip-prefix", "bare.pt", plain)
        self.loaders()
        self.without_a_model(loaded, *truths)

    def fault(self, what: str) -> None:
        self.faults.append(what)

    def run(self, *arguments: str) -> int:
        try:
            return int(group.main(list(arguments), "ckptfix", standalone_mode=False))
        except CkptfixError as error:
            if not error.hint:
                self.fault(f"{arguments[0]}: no hint: {error}")
            return 2

    def values(self, door: str, found: dict[str, Any] | None) -> None:
        """What a model has that took what a door gave."""
        if found is None:
            self.fault(f"{door}: torch refuses what came out")
        elif self.outcome == "a part":
            if new := told(found) - self.there:
                self.fault(f"{door}: values that were not there: {sorted(new)[0][:2]}")
            self.verdicts.append("right")
        elif all(unlike(found, allowed) for allowed in self.allowed):
            self.fault(f"{door}: other values: {[unlike(found, one) for one in self.allowed]}")
        else:
            self.verdicts.append("right")

    def refused(self, door: str) -> None:
        if self.outcome == "right":
            self.fault(f"{door}: refused, though the weights are there")
        self.verdicts.append("refused")

    def check(self, plain: bool) -> None:
        code = self.run("check", str(self.path), "--model", self.reference)
        if code == 0 and not plain and self.path.is_file() and by_torch(self.path) is not None:
            self.fault("check: matches, and torch takes nothing of it")
        if code == 0 and self.outcome == "wrong":
            self.fault("check: matches what nobody can load")
        self.verdicts.append("refused" if code else "right")

    def writes(self, verb: str, name: str, plain: bool) -> None:
        out = self.path.parent / name
        door = f"{verb} {name}"
        code = self.run(verb, str(self.path), str(out), "--model", self.reference)
        if code == 0:
            if self.outcome == "damaged":
                self.fault(f"{door}: damaged values are passed on")
            self.values(door, self.read(out, plainly=verb == "fix" and self.outcome == "right"))
        elif out.exists():
            self.fault(f"{door}: exit {code}, and a file")
        elif code == 1 and plain:
            self.verdicts.append("right")  # nothing to repair
        elif not (verb == "strip-prefix" or name.endswith(".safetensors")):
            self.refused(door)
        situations.removed(out)

    def read(self, out: Path, plainly: bool) -> dict[str, Any] | None:
        """What a new model has that takes a file, by torch's default loader where that can be."""
        if out.suffix != ".safetensors":
            tree = torch.load(out, weights_only=plainly, map_location="cpu")
            found = (taken(self.make, state) for state in ([tree] if plainly else states(tree)))
            return next((state for state in found if state is not None), None)
        if (state := taken(self.make, safetensors.torch.load_file(out))) is not None:
            return state
        model = self.make()
        safetensors.torch.load_model(model, out, strict=True)  # tied names, of which one is written
        return dict(model.state_dict())

    def loaders(self) -> None:
        try:
            found = ckptfix.load_state_dict(self.path, model=self.make())
        except CkptfixError:
            self.refused("load_state_dict")
        else:
            self.values("load_state_dict", taken(self.make, found))
        model = self.make()
        before = {key: str(value) for key, value in model.state_dict().items()}
        try:
            ckptfix.load_into(model, self.path)
        except CkptfixError:
            self.refused("load_into")
            if {key: str(value) for key, value in model.state_dict().items()} != before:
                self.fault("load_into: refused, and the model is changed")
        else:
            self.values("load_into", dict(model.state_dict()))

    def without_a_model(self, loaded: Any, *truths: dict[str, Any]) -> None:
        """No value is made up, and of a sound file none is lost."""
        sound = self.outcome == "right"
        truth = told(list(truths))
        had = told(loaded)
        for verb, name in (
            ("fix", "alone.pt"), ("to-cpu", "cpu.pt"), ("strip-prefix", "bare.pt"),
            ("convert", "same.pt"), ("convert", "other.safetensors"),
        ):  # fmt: skip
            out = self.path.parent / name
            code = self.run(verb, str(self.path), str(out))
            if code == 0 or (verb == "fix" and code == 1 and out.exists()):  # an error is left
                tree = self.tree(out)
                if tree is None and loaded is None and self.outcome != "right":
                    pass  # a class is not here, for torch as little as before
                elif tree is None:
                    self.fault(f"{verb} {name}: torch cannot read what was written")
                elif had and (new := told(tree) - had):
                    self.fault(f"{verb} {name}: values that were not there: {sorted(new)[0][:2]}")
                elif sound and (gone := truth - told(tree)):
                    self.fault(f"{verb} {name}: values are gone: {sorted(gone)[0][:2]}")
                self.verdicts.append("right")
            elif out.exists():
                self.fault(f"{verb} {name}: exit {code}, and a file")
            else:
                self.verdicts.append("refused")
            situations.removed(out)

    def tree(self, out: Path) -> Any:
        if out.suffix == ".safetensors":
            return safetensors.torch.load_file(out)
        return by_torch(out)


def tried(spoil: str, name: str, models: ModuleType, tmp_path: Path) -> Situation:
    make = getattr(models, name)
    model = situations.trained(make(), zlib.crc32(name.encode()))
    path = tmp_path / "in.pt"
    outcome = situations.SPOILS[spoil](model, path)
    situation = Situation(make, f"{models.__file__}:{name}", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        situation.judge(outcome, dict(model.state_dict()))
    return situation


def held(spoil: str, name: str, models: ModuleType, tmp_path: Path, tally: Any) -> None:
    situation = tried(spoil, name, models, tmp_path)
    assert situation.faults == []
    tally("situations")
    for verdict in situation.verdicts:
        tally(f"doors: {verdict}")


@pytest.mark.parametrize(("spoil", "name"), SOME)
def test_a_door_gives_what_torch_takes_or_refuses(
    spoil: str, name: str, models: ModuleType, tmp_path: Path, tally: Callable[..., None]
) -> None:
    held(spoil, name, models, tmp_path, tally)


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "name"), [pair for pair in PAIRS if pair not in SOME])
def test_every_situation(
    spoil: str, name: str, models: ModuleType, tmp_path: Path, tally: Callable[..., None]
) -> None:
    held(spoil, name, models, tmp_path, tally)


# --- inputs on which other people found faults, where they are there

MAKERS = Path(__file__).parents[2] / "shared" / "situations"
SCRIPTS = sorted(
    path for path in MAKERS.glob("*.py") if path.name[0].isdigit() or path.name[0] == "t"
)


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="the makers are not there")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_inputs_of_others(script: Path, tmp_path: Path, tally: Callable[..., None]) -> None:
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path / "made")]
    subprocess.run(command, check=True, capture_output=True, cwd=MAKERS)
    files = [path for path in (tmp_path / "made").iterdir() if path.is_file()]
    sources = [path for path in files if path.suffix == ".py"]
    expected = [by_torch(path) for path in files if "expected" in path.name or path.name == "g.pt"]
    faults = []
    for source in sources:
        space: dict[str, Any] = {}
        exec(source.read_text(), space)
        for name, make in space.items():
            if not isinstance(make, (type, FunctionType)) or name.startswith("_"):
                continue
            try:
                model = make()
            except Exception:  # noqa: BLE001
                continue  # it wants arguments
            if not isinstance(model, nn.Module):
                continue
            for path in set(files) - set(sources):
                place = tmp_path / f"{name}-{path.name}"
                place.mkdir()
                situation = Situation(make, f"{source}:{name}", place / path.name)
                shutil.copy(path, situation.path)
                truths = [found for state in expected if (found := taken(make, state)) is not None]
                situation.judge("any" if truths else "a part", *truths)
                faults += [f"{path.name}, {name}: {fault}" for fault in situation.faults]
                tally("situations")
                for verdict in situation.verdicts:
                    tally(f"doors: {verdict}")
    assert faults == []

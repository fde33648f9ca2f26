"""What a container has no room for is named: nothing is left out unmentioned."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ckptfix
from ckptfix.errors import SelectionError

if TYPE_CHECKING:
    from pathlib import Path

PAIR = [torch.ones(1), torch.zeros(2)]
LOOSE: dict[str, tuple[Any, list[tuple[str, str]]]] = {
    "a list": ([torch.ones(2), 3, "x", None], [("1", "int"), ("2", "str"), ("3", "None")]),
    "nested": (
        {"in": {"x": [1, 2], "t": (torch.ones(3), "s")}, "n": 3},
        [("in/x", "list of 2"), ("in/t/1", "str"), ("n", "int")],
    ),
    "one list in two places": (
        {"a": PAIR, "b": PAIR, "n": {}, "m": 2, "k": 3},
        [("b", "list of 2, the same as a"), ("n", "dict of 0"), ("m", "int"), ("k", "int")],
    ),
    "beside an optimizer": (
        {"o": {"state": {}, "param_groups": []}, "t": [torch.ones(1)]},
        [("o", "dict of 2")],
    ),
    "one tensor in many places": ([PAIR[0]] * 150, []),
}


@pytest.mark.parametrize("out", ["out.safetensors", "out/", "weights only"])
@pytest.mark.parametrize("name", LOOSE)
def test_what_is_no_tensor_is_named_where_there_is_no_state_dict(
    name: str, out: str, tmp_path: Path
) -> None:
    value, expected = LOOSE[name]
    torch.save(value, tmp_path / "in.pt")
    checkpoint = ckptfix.open(tmp_path / "in.pt")
    if out == "weights only":
        from ckptfix.edit.weights_only import weights_only

        left = weights_only(checkpoint.document, checkpoint.state_dicts[-1]).left_out
    else:
        left = checkpoint.save(f"{tmp_path}/{out}")
    assert left == expected


NO_WEIGHTS: dict[str, tuple[Any, str]] = {
    "rng_state.pth": (
        {"python": random.getstate(), "numpy": (1, 2), "cpu": torch.get_rng_state(),
         "cuda": [torch.zeros(16, dtype=torch.uint8)]},
        "states of random number generators",
    ),
    "of one process": (
        {"python": (1,), "numpy": (2,), "cpu": torch.get_rng_state(),
         "cuda": torch.zeros(16, dtype=torch.uint8)},
        "states of random number generators",
    ),
    "a bare one": (torch.get_rng_state(), "states of random number generators"),
    "of a GPU": ({"cuda_rng": torch.zeros(16, dtype=torch.uint8)}, "states of random number"),
    "optimizer.pt": (
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
        "the state of an optimizer",
    ),
    "an optimizer": (torch.optim.SGD([torch.ones(1)], 0.1), "the state of an optimizer"),
    "both": (
        {"o": {"state": {}, "param_groups": []}, "rng": [torch.get_rng_state()]},
        "the state of an optimizer and states of random number generators",
    ),
    "scheduler.pt": ({"last_epoch": 3, "base_lrs": [0.1]}, "the state of a learning rate schedul"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_holds_no_weights_is_said_to_be_what_it_is(name: str, tmp_path: Path) -> None:
    value, what = NO_WEIGHTS[name]
    torch.save(value, tmp_path / "in.pt")
    checkpoint = ckptfix.open(tmp_path / "in.pt")
    with pytest.raises(SelectionError, match=f"holds {what}.*, and no weights"):
        checkpoint.save(tmp_path / "out.safetensors")
    (found,) = [row for row in checkpoint.findings if row.code == "no-state-dict"]
    assert found.message.startswith(f"it holds {what}")
    assert not (tmp_path / "out.safetensors").exists()
    assert checkpoint.save(tmp_path / "out.pt") == []


@pytest.mark.parametrize(
    "weights",
    [
        {"rngnet.weight": torch.ones(2), "seed": torch.zeros(3, dtype=torch.uint8)},
        {"mask": torch.zeros(7, dtype=torch.uint8)},
        {"random_table": torch.zeros(7, 2, dtype=torch.uint8)},
        {"a": np.ones(3, np.uint8)},
    ],
)
def test_rows_of_bytes_alone_make_no_generator(weights: dict[str, Any], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "in.pt")
    assert ckptfix.open(tmp_path / "in.pt").state_dicts[0].role == "model"


def test_generators_beside_weights_are_no_second_model(tmp_path: Path) -> None:
    rng = {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    torch.save({"model": {"w": torch.ones(2)}, "rng": rng}, tmp_path / "in.pt")
    left = ckptfix.open(tmp_path / "in.pt").save(tmp_path / "out.safetensors")
    assert left == [("rng", "dict of 2")]

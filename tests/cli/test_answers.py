"""The contract of `--json`, and the table of exit codes: every verb is run into each of them."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import zipfile
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import pytest
import torch
from torch import nn

from ckptfix import cli
from ckptfix.cli import COMMANDS, answers, output
from ckptfix.cli.exit_codes import EXIT_CODES, as_markdown
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command

if TYPE_CHECKING:
    from pathlib import Path

DOCS = FIXTURES.parent / "docs"
TRAINED = "dataparallel_cuda_training.pt"

RUNS: list[tuple[str, int, list[str]]] = [
    ("inspect", 0, ["cpu.pt"]),
    ("inspect", 0, [TRAINED, "dtypes.pt", "shards"]),
    ("inspect", 0, ["whole_module.pt", "uninstalled_class.pt", "plain.safetensors"]),
    ("inspect", 0, ["swa.pt", "--html", "page.html"]),
    ("inspect", 2, ["page.pt", "tied.pt", "none.pt"]),
    ("inspect", 2, ["cut.pt"]),
    ("inspect", 2, []),
    ("inspect", 2, ["cpu.pt", "--bogus"]),
    ("rename", 2, ["cpu.pt", "out.pt"]),
    ("inspect", 2, ["cpu.pt", "--html", "cpu.pt", "-f"]),
    ("check", 0, ["cpu.pt"]),
    ("check", 0, ["cuda.pt", "ddp.pt", TRAINED, "shards", "legacy.pt"]),
    ("check", 0, ["cpu.pt", "plain.safetensors", "--read-data"]),
    ("check", 0, ["cpu.pt", "cuda.pt", "--like", "cpu.pt"]),
    ("check", 1, ["cpu.pt", "cut.pt", "flipped.pt"]),
    ("check", 1, ["flipped.pt", "--read-data"]),
    ("check", 1, ["quantized.pt"]),
    ("check", 1, ["dangerous.pt"]),
    ("check", 1, ["refused.pt"]),
    ("check", 1, ["refused.pt", "cpu.pt", "--like", "cpu.pt"]),
    ("check", 1, ["ddp.pt", "cpu.pt", "--like", "cpu.pt"]),
    ("check", 1, ["cpu.pt", "--like", "resnet18_dataparallel_cuda.pt"]),
    ("check", 1, ["other_dtype.pt", "--like", "other_shape.pt"]),
    ("check", 2, ["cpu.pt", "page.pt", "cut.pt"]),
    ("check", 2, ["ema.pt", "cpu.pt", "--select", "no"]),
    ("check", 2, ["cpu.pt", "--model", "none.py:Net"]),
    ("check", 2, ["cpu.pt", "--init", "{}"]),
    ("fix", 0, [TRAINED, "out.pt"]),
    ("fix", 0, ["cpu.pt", "out.pt"]),
    ("fix", 0, ["cpu.pt", "out.safetensors", "--dry-run"]),
    ("fix", 0, ["swa.pt", "out.pt", "--like", "cpu.pt"]),
    ("fix", 0, ["tied.pt", "out.safetensors"]),
    ("fix", 0, ["dangerous.pt", "out.pt"]),
    ("fix", 1, ["quantized.pt", "out.pt"]),
    ("fix", 2, ["page.pt", "out.pt"]),
    ("fix", 2, ["flipped.pt", "out.pt"]),
    ("fix", 2, ["cpu.pt", "out.pt", "--like", "resnet18_dataparallel_cuda.pt"]),
    ("fix", 2, ["mixed_prefix.pt", "out.pt"]),
    ("fix", 2, ["cpu.pt"]),
    ("recover", 0, ["cpu.pt", "out.pt"]),
    ("recover", 0, ["legacy.pt", "out.pt", "--like", "cpu.pt"]),
    ("recover", 1, ["cut.pt", "out.pt", "--like", "cpu.pt"]),
    ("recover", 1, ["cut.pt", "out.pt"]),
    ("recover", 2, ["page.pt", "out.pt"]),
    ("explain", 0, ['Missing key(s) in state_dict: "w". Unexpected key(s): "module.w".']),
    ("explain", 0, ["train.log"]),
    ("explain", 1, ["cpu.pt"]),
    ("explain", 2, ["none.log"]),
    ("strip-prefix", 0, ["ddp.pt", "out.pt"]),
    ("strip-prefix", 0, ["ddp.pt", "--in-place"]),
    ("strip-prefix", 0, ["ddp.pt", "out.pt", "--dry-run"]),
    ("strip-prefix", 0, ["two.pt", "out.pt"]),
    ("strip-prefix", 0, [TRAINED, "out.safetensors", "--like", "cpu.pt"]),
    ("strip-prefix", 1, ["cpu.pt", "out.pt"]),
    ("strip-prefix", 2, ["own_child_module.pt", "out.pt"]),
    ("strip-prefix", 2, ["ddp.pt", "cpu.pt"]),
    ("strip-prefix", 2, ["swa.pt", "out.pt", "--like", "cpu.pt"]),
    ("add-prefix", 0, ["cpu.pt", "out/"]),
    ("add-prefix", 1, ["cpu.pt", "out.pt", "--prefix", ""]),
    ("add-prefix", 2, ["two.pt", "out.pt"]),
    ("rename", 0, ["cpu.pt", "out.pt", "--sub", "linears", "layers"]),
    ("rename", 1, ["cpu.pt", "out.pt", "--sub", "x", "y"]),
    ("rename", 2, ["cpu.pt", "out.pt", "--sub", "(", "y"]),
    ("to-cpu", 0, [TRAINED, "out.pt", "--verify"]),
    ("to-cpu", 1, ["cpu.pt", "out.pt"]),
    ("to-cpu", 2, ["none.pt", "out.pt"]),
    ("convert", 0, [TRAINED, "out.safetensors"]),
    ("convert", 0, ["ema.pt", "out.safetensors", "--select", "state_dict", "--dtype", "half"]),
    ("convert", 0, ["views.pt", "out.pt", "--compact"]),
    ("convert", 2, ["ema.pt", "out.zip"]),
    ("convert", 2, ["dtypes.pt", "out.safetensors"]),
    ("convert", 2, ["cpu.pt", "out.pt", "--max-shard-size", "x"]),
    ("diff", 0, ["cpu.pt", "cuda.pt"]),
    ("diff", 1, ["cpu.pt", "ddp.pt", "--keys-only"]),
    ("diff", 1, ["other_dtype.pt", "other_shape.pt", "--html", "page.html"]),
    ("diff", 1, [TRAINED, "resnet18_dataparallel_cuda.pt"]),
    ("diff", 2, ["cpu.pt", "none.pt"]),
    ("diff", 2, ["cpu.pt"]),
]


_NO_GPU = (
    "RuntimeError: Attempting to deserialize object on a CUDA device but "
    "torch.cuda.is_available() is False."
)


class _Danger:
    def __reduce__(self) -> Any:
        return eval, ("1",)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the fixtures, and files that are damaged or are something else."""
    for path in FIXTURES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    data = (FIXTURES / "cpu.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:1200])
    values = torch.load(FIXTURES / "cpu.pt")["linears.1.weight"].numpy().tobytes()
    (tmp_path / "flipped.pt").write_bytes(data.replace(values, values[:-1] + b"?"))
    (tmp_path / "page.pt").write_text("<!doctype html>")
    (tmp_path / "train.log").write_text(_NO_GPU)
    with warnings.catch_warnings(action="ignore"):
        model = nn.Sequential(nn.Linear(2, 2))
        torch.save(torch.ao.quantization.quantize_dynamic(model), tmp_path / "quantized.pt")
    torch.save({"w": torch.ones(2), "v": torch.ones(2), "x": _Danger()}, tmp_path / "dangerous.pt")
    own = {"module.w": torch.ones(1), "head.w": torch.ones(1)}
    torch.save({"gen": {"module.v": torch.ones(1)}, "disc": own}, tmp_path / "two.pt")
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "e": 1}, tmp_path / "other_shape.pt")
    torch.save({"a": torch.zeros(2).half(), "b": torch.ones(2)}, tmp_path / "other_dtype.pt")
    with zipfile.ZipFile(tmp_path / "refused.pt", "w") as deep:
        whole = zipfile.ZipFile(tmp_path / "cpu.pt")
        for name in whole.namelist():
            deep.writestr(f"runs/{name}", whole.read(name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ckptfix", "convert", "ddp.pt", "shards/"])
    assert cli._run(output.Form()) == 0
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the program, in this process."""
    monkeypatch.setattr(sys, "argv", ["ckptfix", *arguments])
    return cli._run(output.Form())


# --- the exit codes


def test_every_exit_code_of_every_verb_is_told_and_run_into() -> None:
    assert list(EXIT_CODES) == list(COMMANDS)
    ran = {verb: {code for other, code, _ in RUNS if other == verb} for verb in COMMANDS}
    assert ran == {verb: set(codes) for verb, codes in EXIT_CODES.items()}


def test_the_documentation_of_exit_codes_is_the_table() -> None:
    assert as_markdown() in (DOCS / "exit-codes.md").read_text("utf-8")


def named(value: Any) -> str | None:
    return " ".join(value) if isinstance(value, list) else None


@pytest.mark.parametrize(("verb", "code", "arguments"), RUNS, ids=named)
def test_a_verb_ends_in_the_code_that_is_told(
    verb: str, code: int, arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path for path in here.rglob("*") if path.is_file()}
    assert run(monkeypatch, verb, *arguments) == code
    if code == 2 or "nothing was written" in EXIT_CODES[verb][code]:
        assert {path for path in here.rglob("*") if path.is_file()} == before


# --- the fields


def misfit(value: Any, kind: Any, where: str = "") -> str | None:
    """Where a value is not what a type says; None where it is."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return misfit(value, args[0], where)
    if origin is Literal:
        return None if value in args else f"{where}: {value!r}"
    if is_typeddict(kind):
        return misfit_of_fields(value, get_type_hints(kind, include_extras=True), where)
    if origin is list:
        rows = enumerate(value) if isinstance(value, list) else [("", value)]
        return next((m for i, row in rows if (m := misfit(row, args[0], f"{where}[{i}]"))), None)
    if origin is dict:
        items = value.items() if isinstance(value, dict) else [("", value)]
        return next((m for key, it in items if (m := misfit(it, args[1], f"{where}.{key}"))), None)
    if args:  # a union
        found = [misfit(value, arg, where) for arg in args]
        return None if None in found else found[0]
    is_number = kind is float and type(value) is int
    return None if type(value) is kind or is_number else f"{where}: {value!r}"


def misfit_of_fields(value: Any, fields: dict[str, Any], where: str = "") -> str | None:
    if not isinstance(value, dict) or value.keys() != fields.keys():
        names = value.keys() ^ fields.keys() if isinstance(value, dict) else value
        return f"{where}: {names}"
    return next(
        (m for name, kind in fields.items() if (m := misfit(value[name], kind, f"{where}.{name}"))),
        None,
    )


def refuse(constant: str) -> None:
    raise AssertionError(constant)


def told(text: str) -> list[dict[str, Any]]:
    """The answers, one on each line."""
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize(("verb", "code", "arguments"), RUNS, ids=named)
def test_every_answer_is_of_the_documented_type(
    verb: str,
    code: int,
    arguments: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert run(monkeypatch, verb, *arguments, "--json") == code
    streams = capsys.readouterr()
    rows = told(streams.out)
    hints = [get_type_hints(one, include_extras=True) for one in (answers.Answer, FIELDS[verb])]
    for row in rows:
        assert misfit_of_fields(row, {**hints[0], **hints[1]}) is None
        assert (row["schema"], row["command"]) == (2, verb)
        assert (row["error"] is None) == (row["exit_code"] < 2 and row.get("sound") is not False)
        assert row["output"] is None or row["exit_code"] < 2
    assert max(row["exit_code"] for row in rows) == code
    failed = [row["error"] for row in rows if row["exit_code"] == 2]
    said = [line for line in streams.err.splitlines() if line.startswith(("error: ", "note: "))]
    assert len(said) == len(failed)
    assert bool(streams.err) == bool(failed)
    for line, error in zip(said, failed, strict=True):
        where = "" if error["where"] is None else f"{error['where']}: "
        assert line == f"error: {where}{error['message']}"


FIELDS = answers.VERBS


@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_each_file_has_an_answer_in_order_and_a_bad_one_stops_nothing(
    verb: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["cpu.pt", "page.pt", "cut.pt", "none.pt", "tied.pt"]
    capsys.readouterr()
    assert run(monkeypatch, verb, *files, "--json") == 2
    rows = told(capsys.readouterr().out)
    assert [row["input"] for row in rows] == files
    damaged = 1 if verb == "check" else 2
    assert [row["exit_code"] for row in rows] == [0, 2, damaged, 2, 0]
    codes = [row["error"] and row["error"]["code"] for row in rows]
    assert codes == [None, "html", "damaged", "unreadable", None]
    assert run(monkeypatch, verb, *files) == 2
    streams = capsys.readouterr()
    assert streams.err.count("error: ") == (2 if verb == "check" else 3)
    assert "tied.pt" in streams.out


def test_the_verbs_are_those_of_the_command_line() -> None:
    assert list(FIELDS) == list(COMMANDS)


def test_the_documentation_is_the_types() -> None:
    assert answers.as_markdown() in (DOCS / "json.md").read_text("utf-8")


def test_a_value_that_looks_like_the_option_is_a_value(here: Path) -> None:
    ran = ckptfix_command("add-prefix", "cpu.pt", "out.pt", "--prefix", "--json", cwd=here)
    assert ran.stdout == "wrote out.pt: 3 keys renamed (added --json.)\n"
    ran = ckptfix_command("add-prefix", "none.pt", "out.pt", "--prefix", "--json", cwd=here)
    assert (ran.returncode, ran.stdout) == (2, "")


@pytest.mark.parametrize("name", ["unknown", "no"])
def test_a_word_that_is_no_verb_is_answered_too(name: str) -> None:
    ran = ckptfix_command(name, "x.pt", "--json")
    (row,) = told(ran.stdout)
    assert (ran.returncode, row["command"], row["error"]["code"]) == (2, None, "usage")
    hints = get_type_hints(answers.Answer, include_extras=True)
    assert misfit_of_fields(row, hints) is None


NOTED = {
    "kept": (["strip-prefix", "two.pt", "out.pt"], "1 of 2 keys keep their 'module.' in disc"),
    "averages": (["convert", "ema.pt", "out.safetensors", "--average"], "taking the averages at"),
}


@pytest.mark.parametrize("name", NOTED)
def test_notes_are_in_the_answer_and_not_on_stderr(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = NOTED[name]
    capsys.readouterr()
    assert run(monkeypatch, *arguments, "--json") == 0
    streams = capsys.readouterr()
    assert streams.err == ""
    ((note,),) = [row["notes"] for row in told(streams.out)]
    assert words in note
    assert run(monkeypatch, *arguments, "--force") == 0
    assert f"note: {note}\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["inspect", "cpu.pt"], ["diff", "cpu.pt", "ddp.pt"]])
def test_a_page_and_json_do_not_share_standard_output(
    arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, *arguments, "--html", "-", "--json") == 2


def test_commands_in_an_answer_run_as_they_stand(here: Path) -> None:
    ran = ckptfix_command("check", "ddp.pt", "--like", "cpu.pt", "--json", cwd=here)
    (row,) = told(ran.stdout)
    words = row["remedy"]["command"].split()
    assert words[:2] == ["ckptfix", "fix"]
    assert ckptfix_command(*words[1:], cwd=here).returncode == 0
    ran = ckptfix_command("fix", "cpu.pt", "--json", cwd=here)
    (row,) = told(ran.stdout)
    assert ckptfix_command(*row["error"]["command"].split()[1:], cwd=here).returncode == 0

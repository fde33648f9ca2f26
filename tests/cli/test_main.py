"""The command line as its users meet it: real processes, their streams and exit codes."""

from __future__ import annotations

import json
import os
import pickle
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ckptfix.cli import COMMANDS
from ckptfix.cli.exit_codes import EXIT_CODES
from tests.conftest import FIXTURES
from tests.oracles import ckptfix_command, unlike

ROOT = FIXTURES.parent
TRAINED = "dataparallel_cuda_training.pt"
FOONET = ["--model", "foonet.py:FooNet", "--init", '{"neural_num": 4, "layers": 3}']


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with copies of the fixtures."""
    for path in FIXTURES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def run(here: Path, *arguments: str | Path, **variables: str) -> Any:
    """Run `ckptfix` in a folder, with COLUMNS and the like as given."""
    names = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-m", "ckptfix", *map(str, arguments)]
    return subprocess.run(
        command, cwd=here, env={**kept, **variables}, capture_output=True, text=True, timeout=120
    )


def on_terminal(here: Path, *arguments: str, columns: int = 80, **variables: str) -> str:
    """What `ckptfix` shows on a terminal of its own, escape sequences and all."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ckptfix", *arguments]
    variables = {"COLUMNS": str(columns), "TERM": "xterm-256color", **variables}
    process = subprocess.Popen(
        command, cwd=here, env={**os.environ, **variables}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    process.wait(timeout=60)
    return shown.decode()


# --- help


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(verb: str) -> None:
    shown = ckptfix_command(verb, "--help").stdout.splitlines()
    examples = next(n for n, line in enumerate(shown) if line.strip() in ("Example:", "Examples:"))
    assert "ckptfix " in shown[examples + 1]  # on a line of its own, so that it can be copied
    codes = shown[shown.index("Exit codes:") + 1 :]
    assert [line[2] for line in codes if line[2] != " "] == [*map(str, EXIT_CODES[verb])]


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_readme_names_every_command(verb: str) -> None:
    assert f"| `ckptfix {verb} " in (ROOT / "README.md").read_text("utf-8")


def test_the_list_of_commands_says_what_each_does() -> None:
    shown = ckptfix_command("--help").stdout
    assert [verb for verb in COMMANDS if f"\n  {verb} " in shown] == list(COMMANDS)
    assert "    1  the answer is no, or there was nothing to do\n" in shown


def test_without_a_command_the_help_is_shown() -> None:
    ran = ckptfix_command()
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("Usage: ckptfix")


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["inspct"], "there is no command 'inspct'", "did you mean: ckptfix inspect"),
        (["cpu.pt"], "there is no command 'cpu.pt'", "see what is in it: ckptfix inspect cpu.pt"),
        (["xyz"], "there is no command 'xyz'", "see how it is used: ckptfix --help"),
        (["to-cpu", "cpu.pt"], "OUT", "write a copy: ckptfix to-cpu cpu.pt cpu.fixed.pt"),
        (["convert", "none.pt"], "OUT", "see how it is used: ckptfix convert --help"),
        (["inspect"], "FILE", "see how it is used: ckptfix inspect --help"),
        (["inspect", "--al", "cpu.pt"], "--al", "see how it is used: ckptfix inspect --help"),
        (
            ["check", "cpu.pt", "--init", "{}"],
            "--model",
            "see how it is used: ckptfix check",
        ),
        (
            ["check", "cpu.pt", *FOONET, "--like", "x"],
            "--like",
            "see how it is used: ckptfix check",
        ),
    ],
)
def test_wrong_usage_is_told_in_two_lines(
    here: Path, arguments: list[str], error: str, hint: str
) -> None:
    ran = run(here, *arguments)
    first, second = ran.stderr.splitlines()
    assert (ran.returncode, ran.stdout) == (2, "")
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith(f"hint: {hint}")


def test_shell_completion() -> None:
    script = "import sys; from ckptfix.cli import main; sys.argv[0] = 'ckptfix'; main()"

    def complete(instruction: str, *words: str) -> str:
        told = {"_CKPTFIX_COMPLETE": instruction, "COMP_WORDS": shlex.join(words)}
        environment = {**os.environ, **told, "COMP_CWORD": str(len(words) - 1)}
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    assert "complete -o nosort -F _ckptfix_completion ckptfix" in complete("bash_source")
    assert "strip-prefix" in complete("bash_complete", "ckptfix", "str")
    assert "--partial" in complete("bash_complete", "ckptfix", "strip-prefix", "--part")


# --- commands that write

WRITES = {
    "strip-prefix": [TRAINED],
    "add-prefix": [TRAINED],
    "rename": [TRAINED, "--sub", "linears", "layers"],
    "to-cpu": [TRAINED],
    "convert": [TRAINED],
    "fix": [TRAINED],
}


def writing(verb: str, out: str, *more: str) -> list[str]:
    source, *options = WRITES[verb]
    return [verb, source, out, *options, *more]


@pytest.mark.parametrize("verb", WRITES)
def test_the_answer_is_on_stdout_and_the_output_is_there(here: Path, verb: str) -> None:
    ran = run(here, *writing(verb, "out.pt"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1].startswith("wrote out.pt: ")
    assert torch.load(here / "out.pt", map_location="cpu", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("verb", WRITES)
def test_a_dry_run_says_the_same_and_writes_nothing(here: Path, verb: str) -> None:
    before = sorted(here.iterdir())
    dry = run(here, *writing(verb, "out.pt", "--dry-run"))
    assert (dry.returncode, sorted(here.iterdir())) == (0, before)
    real = run(here, *writing(verb, "out.pt"))
    assert dry.stdout.splitlines()[-1].replace("would write ", "wrote ") + "\n" in real.stdout
    assert set(real.stdout.splitlines()[:-1]) <= set(dry.stdout.splitlines())


@pytest.mark.parametrize("verb", WRITES)
def test_an_output_that_is_there_is_replaced_only_by_force(here: Path, verb: str) -> None:
    (here / "out.pt").write_text("precious")
    assert run(here, *writing(verb, "out.pt")).returncode == 2
    assert run(here, *writing(verb, "out.pt", "--dry-run")).returncode == 2
    assert (here / "out.pt").read_text() == "precious"
    assert run(here, *writing(verb, "out.pt", "--force")).returncode == 0
    assert (here / "out.pt").read_bytes().startswith(b"PK")


@pytest.mark.parametrize("verb", WRITES)
def test_json_has_the_schema_and_says_what_was_done(here: Path, verb: str) -> None:
    ran = run(here, *writing(verb, "out.safetensors", "--json"))
    told = json.loads(ran.stdout)
    assert ran.returncode == 0
    assert {key: told[key] for key in ("schema", "command", "input", "output", "dry_run")} == {
        "schema": 2,
        "command": verb,
        "input": TRAINED,
        "output": "out.safetensors",
        "dry_run": False,
    }
    assert {"path": "epoch", "kind": "int"} in told["left_out"]
    assert told["done"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["strip-prefix", "cpu.pt", "out.pt"], "no key has a wrapper's prefix"),
        (["strip-prefix", "cpu.pt", "out.pt", "--prefix", "x."], "no key begins with 'x.'"),
        (["strip-prefix", "swa.pt", "out.pt"], "no key has a wrapper's prefix"),
        (["add-prefix", "cpu.pt", "out.pt", "--prefix", ""], "an empty prefix changes no key"),
        (["rename", "cpu.pt", "out.pt", "--sub", "x", "y"], "no key matches 'x'"),
        (["to-cpu", "cpu.pt", "out.pt"], "every storage is on the CPU already"),
    ],
)
def test_nothing_to_do_is_said_and_is_a_no(here: Path, arguments: list[str], why: str) -> None:
    ran = run(here, *arguments)
    source = arguments[1]
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout == f"{source}: {why}; nothing written\n"
    told = json.loads(run(here, *arguments, "--json").stdout)
    assert (told["schema"], told["output"], told["done"]) == (2, None, why)
    assert not (here / "out.pt").exists()


def test_json_of_renaming_has_every_key(here: Path) -> None:
    told = json.loads(run(here, "strip-prefix", TRAINED, "out.pt", "--json").stdout)
    (row,) = told["renamed"]
    assert (row["path"], row["removed"], row["added"]) == ("model_state_dict", "module.", "")
    keys = {f"module.linears.{n}.weight": f"linears.{n}.weight" for n in range(3)}
    assert row["keys"] == keys


def test_json_of_to_cpu_has_the_tags(here: Path) -> None:
    assert json.loads(run(here, "to-cpu", TRAINED, "out.pt", "--json").stdout)["retagged"] == {
        "cuda:0": 9
    }


def test_what_is_left_out_is_counted_and_named_beside_the_answer(here: Path) -> None:
    ran = run(here, "convert", TRAINED, "out.safetensors")
    assert ran.stdout == "wrote out.safetensors: torch zip to safetensors, 3 tensors\n"
    assert ran.stderr.startswith("note: 6 things left out of it: optimizer_state_dict (dict of 2)")
    assert "device (torch.device)" in ran.stderr


def test_a_prefix_that_some_keys_lack_is_told_of_where_others_are_stripped(here: Path) -> None:
    wrapped, own = {"module.w": torch.ones(1)}, {"module.w": torch.ones(1), "head.w": torch.ones(1)}
    torch.save({"gen": wrapped, "disc": own}, here / "in.pt")
    ran = run(here, "strip-prefix", "in.pt", "out.pt")
    assert ran.stdout == "wrote out.pt: 1 key renamed (removed module.) in gen\n"
    assert ran.stderr == "note: 1 of 2 keys keep their 'module.' in disc: 'head.w' has none\n"
    assert list(torch.load(here / "out.pt")["disc"]) == list(own)
    assert run(here, "strip-prefix", "in.pt", "all.pt", "--partial").stderr == ""


def test_what_only_safetensors_holds_is_named_where_pt_leaves_it_out(here: Path) -> None:
    texts = {"format": "pt", "license": "mit"}
    safetensors.torch.save_file({"w": torch.ones(1)}, here / "in.safetensors", metadata=texts)
    ran = run(here, "convert", "in.safetensors", "out.pt")
    assert ran.stderr == "note: 1 thing left out of it: __metadata__/license (str)\n"
    assert run(here, "add-prefix", "in.safetensors", "out.safetensors").stderr == ""
    with safetensors.safe_open(here / "out.safetensors", "pt") as written:
        assert written.metadata() == texts


def test_select_takes_one_of_several_state_dicts(here: Path) -> None:
    ran = run(here, "convert", "ema.pt", "out.safetensors", "--select", "state_dict_ema")
    assert ran.stdout == "wrote out.safetensors: torch zip to safetensors, 3 tensors\n"
    assert ran.stderr == "note: 1 thing left out of it: state_dict (dict of 3)\n"


def test_the_two_repairs_give_what_torch_gives_with_map_location_and_renamed_keys(
    here: Path,
) -> None:
    assert run(here, "strip-prefix", TRAINED, "a.pt").returncode == 0
    assert run(here, "to-cpu", "a.pt", "b.pt").returncode == 0
    expected = torch.load(here / TRAINED, map_location="cpu", weights_only=True)
    weights = expected["model_state_dict"]
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")
    assert unlike(torch.load(here / "b.pt", weights_only=True), expected) is None


# --- inspect


def test_inspect_shows_the_tree_and_then_what_is_wrong(here: Path) -> None:
    shown = run(here, "inspect", TRAINED).stdout
    tree, problems = shown.split("\n\n")
    for line in (
        "├── model_state_dict  state dict, 3 tensors, 192 B, cuda:0, prefix module.",
        "│   ├── module.linears.0.weight  [4, 4]  float32  64 B",
        "├── optimizer_state_dict  optimizer, 3 parameters, 1 group, 396 B, cpu/cuda:0",
        "│   │   ├── 0  step [], exp_avg [4, 4], exp_avg_sq [4, 4]",
        "│   └── _last_lr  [0.01]",
        "├── epoch  1",
        "├── rng_state  [5056] uint8 5.1 kB cpu",
        "└── device  torch.device('cuda', 0)",
    ):
        assert line in tree.splitlines()
    assert "│       └── 0  lr 0.01, betas (0.9, 0.999), eps 1e-08" in tree
    assert f"\n        ckptfix to-cpu {TRAINED} dataparallel_cuda_training.cpu.pt\n" in problems
    assert "warning prefix-wrapper (model_state_dict): all 3 keys begin" in problems


def test_the_commands_that_inspect_gives_can_be_run(here: Path) -> None:
    shown = run(here, "inspect", TRAINED, COLUMNS="40").stdout  # narrow, and never wrapped
    commands = [line.strip() for line in shown.splitlines() if line.strip().startswith("ckptfix ")]
    assert [shlex.split(command)[1] for command in commands] == ["to-cpu", "strip-prefix", "fix"]
    for command in commands:
        assert run(here, *shlex.split(command)[1:]).returncode == 0


def test_inspect_as_json_has_what_the_tree_shows(here: Path) -> None:
    told = json.loads(run(here, "inspect", "--json", TRAINED).stdout)
    assert (told["schema"], told["command"], told["container"]) == (2, "inspect", "torch zip")
    assert told["devices"] == {"cuda:0": 9, "cpu": 4}
    assert [(row["path"], row["role"], row["prefix"]) for row in told["state_dicts"]] == [
        ("model_state_dict", "model", "module."),
        ("optimizer_state_dict", "optimizer", ""),
    ]
    assert told["state_dicts"][0]["tensors"][0] == {
        "key": "module.linears.0.weight",
        "shape": [4, 4],
        "dtype": "float32",
        "bytes": 64,
        "device": "cuda:0",
    }
    assert [row["code"] for row in told["findings"]] == ["device-tag", "prefix-wrapper"]


def test_inspect_says_what_objects_are_in_the_words_of_today(here: Path) -> None:
    shown = run(here, "inspect", "uninstalled_class.pt").stdout
    assert "seen  collections.defaultdict(int)" in shown
    assert "data  pathlib.PosixPath('data', 'train')\n" in shown
    assert "tags  ['a', 'b']" in shown
    assert "__builtin__" not in shown
    assert "<args>" not in shown


def test_inspect_shows_the_device_of_each_tensor_where_they_differ(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = iter(["cpu", "xla:1"])
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: next(tags))
    torch.save({"a": torch.zeros(2), "b": torch.ones(2)}, here / "two.pt")
    shown = run(here, "inspect", "two.pt").stdout
    assert "state dict, 2 tensors, 16 B, cpu/xla:1\n" in shown
    assert "a  [2]  float32  8 B  cpu\n" in shown
    assert "b  [2]  float32  8 B  xla:1\n" in shown


def test_inspect_cuts_long_lists_unless_asked_for_all(here: Path) -> None:
    name = "resnet18_dataparallel_cuda.pt"
    short, whole = (run(here, "inspect", *more, name).stdout for more in ([], ["--all"]))
    assert "└── … and 98 more keys (--all shows them)" in short
    assert short.count("float32") + short.count("int64") == 24
    assert whole.count("float32") + whole.count("int64") == 122


def test_inspect_shows_the_files_it_can_read_and_names_the_others(here: Path) -> None:
    (here / "page.pt").write_text("<!doctype html>")
    ran = run(here, "inspect", "cpu.pt", "page.pt", "tied.pt")
    assert ran.returncode == 2
    assert ran.stdout.count("└── /  state dict") == 2
    assert ran.stderr.startswith("error: page.pt: is an HTML page")


# --- check


def test_check_of_a_sound_file(here: Path) -> None:
    ran = run(here, "check", "cpu.pt")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "cpu.pt: structure is sound (torch zip, 2.2 kB)\n"


def test_check_lists_what_it_noticed_in_a_sound_file(here: Path) -> None:
    ran = run(here, "check", "cuda.pt")
    assert ran.returncode == 0
    assert "ckptfix to-cpu cuda.pt cuda.cpu.pt" in ran.stdout
    told = json.loads(run(here, "check", "cuda.pt", "--json").stdout)
    assert (told["sound"], [row["code"] for row in told["findings"]]) == (True, ["device-tag"])


@pytest.mark.parametrize("name", ["cpu.pt", "plain.safetensors", "legacy.pt"])
def test_check_of_a_damaged_file_is_a_no(here: Path, name: str) -> None:
    cut = here / f"cut_{name}"
    cut.write_bytes((here / name).read_bytes()[:-60])
    ran = run(here, "check", cut.name)
    assert ran.returncode == 1
    assert ran.stdout.startswith(f"{cut.name}: damaged: ")
    assert ran.stderr.startswith("hint: ")
    told = json.loads(run(here, "check", cut.name, "--json").stdout)
    assert (told["exit_code"], told["sound"], told["error"]["code"]) == (1, False, "damaged")


def test_check_against_a_model_that_matches(here: Path) -> None:
    ran = run(here, "check", "cpu.pt", *FOONET)
    assert ran.returncode == 0
    assert ran.stdout == (
        "cpu.pt matches foonet.py:FooNet\n3 of 3 keys match, 100.0% of the elements\n"
    )


def test_check_against_a_model_says_what_does_not_match_and_what_mends_it(here: Path) -> None:
    ran = run(here, "check", "dataparallel.pt", *FOONET, COLUMNS="80")
    assert (ran.returncode, ran.stderr) == (1, "")
    lines = ran.stdout.splitlines()
    assert lines[:3] == [
        "dataparallel.pt does not match foonet.py:FooNet",
        "0 of 3 keys match, 0.0% of the elements",
        "3 missing, 3 unexpected",
    ]
    assert "  - linears.0.weight" in lines
    assert "  + module.linears.0.weight" in lines
    assert "With strict=False, 48 of 48 elements would silently stay at random." in lines
    words = shlex.split(lines[-1])
    assert words == ["ckptfix", "fix", "dataparallel.pt", "dataparallel.fixed.pt", *FOONET]
    assert run(here, *words[1:]).returncode == 0
    assert run(here, "check", words[3], *FOONET).returncode == 0


def test_check_as_json_has_the_whole_report(here: Path) -> None:
    wider = ["--model", "foonet.py:FooNet", "--init", '{"neural_num": 5, "layers": 2}']
    ran = run(here, "check", "cpu.pt", *wider, "--json")
    told = json.loads(ran.stdout)
    assert (ran.returncode, told["loads"], told["share"]) == (1, False, 0.0)
    assert told["remedy"]["command"] is None
    assert "shapes differ" in told["remedy"]["message"]
    assert told["unexpected"] == ["linears.2.weight"]
    assert told["shape_mismatch"][0] == {
        "key": "linears.0.weight",
        "found": {"shape": [4, 4], "dtype": "float32", "kind": ""},
        "wanted": {"shape": [5, 5], "dtype": "float32", "kind": ""},
    }
    assert told["elements_left_at_random"] == 50


def test_a_hundred_percent_is_said_only_of_all(here: Path) -> None:
    many = {"a": torch.zeros(10_000), "b": torch.zeros(1)}
    torch.save(many, here / "two.pt")
    torch.save({"a": many["a"]}, here / "one.pt")
    ran = run(here, "check", "one.pt", "--like", "two.pt")
    assert "1 of 2 keys match, 99.9% of the elements\n1 missing\n" in ran.stdout


@pytest.mark.parametrize("like", ["ddp.pt", "dataparallel.safetensors", "ddp.json"])
def test_check_against_another_checkpoint_or_its_json(here: Path, like: str) -> None:
    (here / "ddp.json").write_text(run(here, "inspect", "--json", "ddp.pt").stdout)
    assert run(here, "check", "dataparallel.pt", "--like", like).returncode == 0
    ran = run(here, "check", "cpu.pt", "--like", like)
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1] == f"  ckptfix fix cpu.pt cpu.fixed.pt --like {like}"


# --- bad input


def _random(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000))


def _cut(name: str, size: int) -> Any:
    return lambda path: path.write_bytes((FIXTURES / name).read_bytes()[:size])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BAD_INPUT = {
    "missing file": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "empty file": (lambda path: path.touch(), "empty"),
    "git-lfs pointer": (lambda path: path.write_text(LFS), "git-lfs pointer"),
    "HTML page": (lambda path: path.write_text("\n<html><body>Sign in"), "HTML"),
    "JSON": (lambda path: path.write_text('{"error": "not found"}'), "JSON"),
    "zeros": (lambda path: path.write_bytes(bytes(9000)), "zero bytes"),
    "random bytes": (_random, "not a checkpoint"),
    "truncated zip": (_cut("cpu.pt", 1500), "zip archive"),
    "truncated safetensors": (_cut("plain.safetensors", 300), "bytes of tensors are there"),
    "truncated safetensors header": (_cut("plain.safetensors", 100), "cut short"),
    "text": (lambda path: path.write_text("hello, this is some text\n"), "not a checkpoint"),
}


@pytest.mark.parametrize("verb", ["inspect", "strip-prefix"])
@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_named_in_one_line_with_one_hint(tmp_path: Path, what: str, verb: str) -> None:
    make, words = BAD_INPUT[what]
    make(tmp_path / "in.pt")
    before = sorted(tmp_path.iterdir())
    more = [] if verb == "inspect" else ["out.pt", *WRITES[verb][1:]]
    assert_refused(run(tmp_path, verb, "in.pt", *more), "in.pt: ", words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("verb", WRITES)
def test_every_command_that_writes_refuses_what_is_no_checkpoint(tmp_path: Path, verb: str) -> None:
    source, *options = WRITES[verb]
    (tmp_path / source).write_text(LFS)
    assert_refused(run(tmp_path, verb, source, "out.pt", *options), "git-lfs pointer")
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("what", ["missing file", "JSON", "truncated zip"])
def test_bad_input_is_named_in_json_too(tmp_path: Path, what: str) -> None:
    BAD_INPUT[what][0](tmp_path / "in.pt")
    ran = run(tmp_path, "convert", "in.pt", "out.pt", "--json")
    told = json.loads(ran.stdout)
    assert (ran.returncode, told["exit_code"]) == (2, 2)
    assert f"error: {told['error']['where']}: {told['error']['message']}\n" in ran.stderr
    assert f"hint: {told['error']['hint']}\n" in ran.stderr


def assert_refused(ran: Any, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line for the error and one for the hint."""
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    error, hint = (line for line in ran.stderr.splitlines() if not line.startswith("note: "))
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    for word in words:
        assert word in error


REFUSED = {
    "OUT exists": ("convert cpu.pt cuda.pt", "cuda.pt: is there already"),
    "no folder for OUT": ("convert cpu.pt no/out.pt", "does not exist"),
    "no container for OUT": ("convert cpu.pt out.zip", "no container has the extension '.zip'"),
    "OUT is IN": ("convert cpu.pt cpu.pt --force", "is the input itself"),
    "OUT is IN, spelled otherwise": ("convert cpu.pt ./cpu.pt --force", "is the input itself"),
    "no such model file": ("check cpu.pt --model no.py:Net", "no.py"),
    "no such module": ("check cpu.pt --model no.such:Net", "cannot be imported"),
    "no such class": ("check cpu.pt --model foonet.py:Net", "no 'Net'"),
    "a model that is none": ("check cpu.pt --model foonet.py:torch", "foonet.py:torch"),
    "no name of a model": ("check cpu.pt --model foonet.py", "FILE.py:NAME"),
    "a model that wants arguments": ("check cpu.pt --model foonet.py:FooNet", "neural_num"),
    "a model that breaks": ("check cpu.pt --model broken.py:Net", "RuntimeError: on purpose"),
    "arguments that are no JSON": ("check cpu.pt --model foonet.py:FooNet --init {", "JSON"),
    "arguments that are a number": ("check cpu.pt --model foonet.py:FooNet --init 3", "--init"),
    "no such file to compare with": ("check cpu.pt --like no.pt", "no.pt"),
    "no checkpoint to compare with": ("check cpu.pt --like foonet.py", "foonet.py"),
    "no such state dict": (
        "convert ema.pt out.safetensors --select no",
        "there is state_dict, state_dict_ema",
    ),
    "no such state dict to strip": ("strip-prefix ema.pt out.pt --select no", "state_dict_ema"),
    "no such state dict to check": ("check ema.pt --select no", "state_dict_ema"),
    "colliding keys": (
        "strip-prefix mixed_prefix.pt out.pt",
        "mixed_prefix.pt: 'module.a.weight' and 'a.weight' would both become 'a.weight'",
    ),
    "keys that collide when renamed": (
        r"rename cpu.pt out.pt --sub '\d' 0",
        "cpu.pt: 'linears.0.weight' and 'linears.1.weight' would both become",
    ),
    "a prefix that some keys carry": (
        "strip-prefix own_child_module.pt out.pt",
        "own_child_module.pt: 2 of 4 keys begin with 'module.'",
    ),
    "a given prefix that some keys carry": (
        "strip-prefix own_child_module.pt out.pt --prefix head.",
        "own_child_module.pt: 2 of 4 keys begin with 'head.'",
    ),
    "a dtype that the output cannot hold": (
        "convert dtypes.pt out.safetensors",
        "'bytes.complex32' is a complex32 tensor",
    ),
    "no valid pattern": ("rename cpu.pt out.pt --sub '(' x", "'('"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused_in_two_lines(here: Path, what: str) -> None:
    (here / "broken.py").write_text("def Net(): raise RuntimeError('on purpose')\n")
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    command, words = REFUSED[what]
    assert_refused(run(here, *shlex.split(command)), words)
    assert {path: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


class _Malice:
    """A pickle of it runs a command when Python loads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.marker))}",)


@pytest.mark.parametrize("in_a_zip", [True, False])
def test_a_pickle_that_runs_commands_runs_none(tmp_path: Path, in_a_zip: bool) -> None:
    marker, bad = tmp_path / "marker", tmp_path / "bad.pt"
    if in_a_zip:
        torch.save({"w": torch.zeros(2), "module.x": _Malice(marker)}, bad)
    else:
        bad.write_bytes(pickle.dumps({"x": _Malice(marker)}))
    commands: list[list[str | Path]] = [
        ["inspect", "--all", bad],
        ["inspect", "--json", bad],
        ["check", bad],
        ["check", bad, "--like", bad],
    ]
    commands += [[verb, bad, tmp_path / f"{verb}.pt", *WRITES[verb][1:]] for verb in WRITES]
    for arguments in commands:
        ran = run(tmp_path, *arguments)
        assert ran.returncode in (0, 1, 2)
        assert "internal" not in ran.stderr
        assert not marker.exists(), arguments
    assert "posix.system" in run(tmp_path, "inspect", bad).stdout
    pickle.loads(pickle.dumps(_Malice(marker)))  # and it would have
    assert marker.exists()


# --- terminals and pipes


def test_a_reader_that_leaves_early_gets_no_traceback(here: Path) -> None:
    names = [str(index) for index in range(5_000)]
    torch.save({name: torch.zeros(0) for name in names}, here / "big.pt")
    for arguments in (["inspect", "--all", "big.pt"], ["inspect", "--json", "big.pt"]):
        command = [sys.executable, "-m", "ckptfix", *arguments]
        with subprocess.Popen(
            command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout
            assert process.stderr
            process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_answer_that_cannot_be_written_is_an_error(here: Path, more: list[str]) -> None:
    command = [sys.executable, "-m", "ckptfix", "check", "cpu.pt", *more]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, cwd=here, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: the answer cannot be written: no space left on device\n")
    assert len(ran.stderr.splitlines()) == 2


def test_an_interrupt_ends_in_one_line(here: Path) -> None:
    waits = "import os, time; open(os.environ['READY'], 'w').close(); time.sleep(60)"
    (here / "wait.py").write_text(waits)
    os.mkfifo(here / "ready")
    command = [sys.executable, "-m", "ckptfix", "check", "cpu.pt", "--model", "wait.py:Net"]
    environment = {**os.environ, "READY": str(here / "ready")}
    process = subprocess.Popen(
        command, cwd=here, env=environment, stderr=subprocess.PIPE, text=True
    )
    with open(here / "ready"):  # returns once the model's file is being run
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "\nerror: interrupted\n")  # below the ^C


def test_colours_only_on_a_terminal_that_wants_them(here: Path) -> None:
    for arguments in (["inspect", TRAINED], ["check", "no.pt"]):
        assert "\x1b[" in on_terminal(here, *arguments)
        assert "\x1b" not in on_terminal(here, *arguments, NO_COLOR="1")
        ran = run(here, *arguments)
        assert "\x1b" not in ran.stdout + ran.stderr


def test_a_terminal_shows_as_much_as_a_pipe(here: Path) -> None:
    shown = on_terminal(here, "inspect", TRAINED, columns=400, NO_COLOR="1")
    assert shown.split() == run(here, "inspect", TRAINED).stdout.split()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_findings_are_wrapped_under_themselves(here: Path, columns: int) -> None:
    shown = run(here, "inspect", TRAINED, COLUMNS=str(columns)).stdout
    problems = shown.split("\n\n")[1].splitlines()
    for line in problems:
        assert line.startswith(("warning ", "all     ", " " * 8))
        assert len(line) <= columns or "ckptfix " in line


def test_in_a_pipe_no_line_is_broken(here: Path) -> None:
    torch.save({"a" * 300: torch.zeros(1)}, here / "long.pt")
    shown = run(here, "inspect", "long.pt").stdout
    assert f"{'a' * 300}  [1]  float32  4 B\n" in shown


def test_names_cannot_command_the_terminal(here: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[31m\u202ered\nerror: fake\r\u009b1m"
    torch.save({evil: torch.zeros(2), "b": 1, f"{evil}c": torch.zeros(2)}, here / "evil.pt")
    torch.save({evil: {"w": torch.zeros(1)}, "s": evil}, here / "deep.pt")
    os.link(here / "evil.pt", here / f"{evil[:8]}\x07\n.pt")
    for arguments in (
        ["inspect", "evil.pt"],
        ["inspect", "--all", "deep.pt"],
        ["inspect", f"{evil[:8]}\x07\n.pt"],
        ["check", "evil.pt", "--like", "cpu.pt"],
        ["check", "cpu.pt", "--like", "evil.pt"],
        ["check", evil],
        ["inspect", f"--{evil}"],
        [evil],
        ["strip-prefix", "deep.pt", "out.pt", "--select", evil],
        ["strip-prefix", "evil.pt", "out.pt", "--prefix", evil],
        ["convert", "deep.pt", "deep.safetensors"],
        ["convert", "evil.pt", f"{evil}.safetensors"],
        ["rename", "evil.pt", "renamed.pt", "--sub", "b", evil],
        ["diff", "evil.pt", "cpu.pt"],
    ):
        shown = on_terminal(here, *arguments, NO_COLOR="1")
        assert shown
        assert not set(shown) & set("\x1b\x07\u202e\u009b"), arguments
        assert "\nerror: fake" not in shown.replace("\r\n", "\n"), arguments

"""What imports what: one direction through the house, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import FIXTURES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PACKAGE = Path(__file__).parents[1] / "ckptfix"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DESIGN = PACKAGE.parent / "docs" / "design.md"
ROWS = [
    re.findall(r"`(\w+)`", line.split("|")[1])
    for line in DESIGN.read_text("utf-8").splitlines()
    if line.startswith("| `")
]
"""The table of rooms in docs/design.md: one imports from its own row, or from those above it."""
ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
HEAVY = {"torch", "rich", "numpy"}


def imports(module: str, *, at_once: bool = False, types: bool = False) -> set[str]:
    """What a module imports when it runs; `at_once`: when it is imported itself; `types`: those
    that only a type checker reads, too."""
    found: set[str] = set()
    pending: list[Any] = [ast.parse(MODULES[module].read_text("utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        if at_once and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
        pending.extend(ast.iter_child_nodes(node))
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def inside(module: str) -> set[str]:
    """The modules of ckptfix that a module imports, for types too."""
    return {name for name in imports(module, types=True) if name in MODULES and name != "ckptfix"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    assert room(module) in ROW_OF, f"give {room(module)} its place in the table of docs/design.md"
    wrong = [name for name in inside(module) if ROW_OF[room(name)] > ROW_OF[room(module)]]
    assert not wrong


def circle(arrows: Mapping[str, Iterable[str]]) -> set[str]:
    """Those of which each imports itself by way of others; none where there is no circle."""
    pending = {name: set(wanted) & set(arrows) - {name} for name, wanted in arrows.items()}
    while pending:
        free = {name for name, wanted in pending.items() if not wanted & set(pending)}
        if not free:
            break
        pending = {name: wanted for name, wanted in pending.items() if name not in free}
    return set(pending)


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert not circle({name: inside(name) for name in MODULES})


def test_no_package_imports_itself_by_way_of_others() -> None:
    arrows: dict[str, set[str]] = {}
    for name in MODULES:
        arrows.setdefault(room(name), set()).update(map(room, inside(name)))
    assert not circle(arrows)


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"], "d": []}) == {"a", "b", "c"}


def test_every_row_names_rooms_that_are_there() -> None:
    assert sum(map(len, ROWS)) == len(ROW_OF)
    assert set(ROW_OF) == {room(name) for name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_imports_click_and_rich(module: str) -> None:
    outside = {name.partition(".")[0] for name in imports(module)}
    if room(module) != "cli":
        assert not outside & {"click", "rich"}
    assert "rich" not in {name.partition(".")[0] for name in imports(module, at_once=True)}


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_late(module: str) -> None:
    at_once = {name.partition(".")[0] for name in imports(module, at_once=True)}
    assert "torch" not in at_once or room(module) == "torch_bridge"


@pytest.mark.parametrize("module", MODULES)
def test_only_output_prints(module: str) -> None:
    calls = [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]
    prints = [call for call in calls if call in ("print", "click.echo", "click.secho")]
    assert not prints or module == "ckptfix.cli.output"


def loaded(*arguments: str | Path) -> set[str]:
    """The modules that Python has imported once it ran something."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, 1), ran.stderr
    return {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}


@pytest.mark.parametrize("statement", ["import ckptfix", "import ckptfix; ckptfix.open"])
def test_importing_ckptfix_imports_nothing_heavy(statement: str) -> None:
    assert not loaded("-c", statement) & HEAVY


def test_the_heavy_modules_are_seen_where_they_are_imported() -> None:
    assert loaded("-c", "import rich") & HEAVY == {"rich"}


TRAINED = FIXTURES / "dataparallel_cuda_training.pt"
DRAWING: dict[str, list[str | Path]] = {
    "inspect": ["inspect", TRAINED],
    "check": ["check", TRAINED, "--like", FIXTURES / "cpu.pt"],
    "diff": ["diff", TRAINED, FIXTURES / "cpu.pt", "--keys-only"],
    "fix": ["fix", TRAINED, "OUT.pt"],
}
PLAIN: dict[str, list[str | Path]] = {
    "help": ["--help"],
    "strip-prefix": ["strip-prefix", TRAINED, "OUT.pt"],
    "strip-prefix to safetensors": ["strip-prefix", TRAINED, "OUT.safetensors"],
    "add-prefix": ["add-prefix", FIXTURES / "cpu.pt", "OUT.pt"],
    "rename": ["rename", FIXTURES / "cpu.pt", "OUT.pt", "--sub", "linears", "layers"],
    "to-cpu": ["to-cpu", TRAINED, "OUT.pt"],
    "convert": ["convert", FIXTURES / "legacy.pt", "OUT.safetensors"],
    "convert back": ["convert", FIXTURES / "dataparallel.safetensors", "OUT.pt"],
    "inspect as JSON": ["inspect", "--json", TRAINED],
    "check as JSON": ["check", "--json", TRAINED],
}


def loaded_by_command(name: str, folder: Path) -> set[str]:
    """What one of the commands above imports; what it writes lies in the folder."""
    words = {**PLAIN, **DRAWING}[name]
    placed = [folder / word if str(word).startswith("OUT") else word for word in words]
    command = [sys.executable, "-c", TELLING, *map(str, placed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, 1), ran.stderr
    return set(ran.stderr.split("imported:")[1].split())


TELLING = """
import atexit, sys
atexit.register(lambda: print("imported:", *sys.modules, file=sys.stderr))
from ckptfix.cli import main
main()
"""
"""A command that tells in the end what it has imported; `-X importtime` misses what is imported by
its name, as formats are."""


@pytest.mark.parametrize("name", [*PLAIN, *DRAWING])
def test_commands_do_without_torch_and_most_without_rich(name: str, tmp_path: Path) -> None:
    allowed = {"rich"} if name in DRAWING else set()
    assert loaded_by_command(name, tmp_path) & HEAVY <= allowed


@pytest.mark.parametrize("name", ["strip-prefix", "add-prefix", "rename", "to-cpu"])
def test_edits_of_a_torch_zip_import_no_other_container(name: str, tmp_path: Path) -> None:
    found = {name for name in loaded_by_command(name, tmp_path) if "ckptfix.formats." in name}
    used = {"reading", "table", "torch_zip", "zip", "zip.archive", "zip.layout", "zip.writer"}
    assert found == {f"ckptfix.formats.{name}" for name in used}


@pytest.mark.parametrize("name", ["strip-prefix", "to-cpu"])
def test_the_usual_path_imports_no_pathlib_and_no_json(name: str, tmp_path: Path) -> None:
    assert not loaded_by_command(name, tmp_path) & {"pathlib", "json"}

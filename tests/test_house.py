"""Rules of the house that no single file shows: who asks the system, who says what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ckptfix"
FILES = sorted(PACKAGE.rglob("*.py"))
ASKING = {
    "os.listdir", "os.lstat", "os.mkdir", "os.open", "os.path.exists", "os.path.getsize",
    "os.path.isdir", "os.path.isfile", "os.path.islink", "os.path.lexists", "os.path.realpath",
    "os.path.samefile", "os.remove", "os.rename", "os.replace", "os.rmdir", "os.scandir", "os.stat",
    "os.unlink", "os.walk", "open",
}  # fmt: skip
"""What asks the file system, or changes it."""

ALLOWED = {
    "api.py": {"open"},  # its own
    "cli/explain.py": {"os.path.exists"},  # an argument is a file or a text
    "cli/__init__.py": {"os.path.exists"},  # a file where a command is expected
    "cli/output.py": {"os.open"},  # /dev/null, once nobody reads the answer
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def calls(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_places_ask_the_file_system(path: Path) -> None:
    name = name_of(path)
    if not name.startswith("bytes/"):
        assert not ASKING.intersection(calls(path)) - ALLOWED.get(name, set())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_hints_put_commands_into_words(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "shlex" not in imported or name_of(path) == "hints.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_error_begins_with_its_place(path: Path) -> None:
    """Where something happened is `where=`, not the beginning of a sentence."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith("Error"):
            continue
        texts = [arg for arg in node.args if isinstance(arg, ast.JoinedStr)]
        for text in texts:
            first, *rest = text.values
            begins = isinstance(first, ast.FormattedValue) and first.conversion == -1 and rest
            after = rest[0].value if begins and isinstance(rest[0], ast.Constant) else ""
            assert not str(after).startswith(": "), f"line {node.lineno}: {ast.unparse(text)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_room_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))

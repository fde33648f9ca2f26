"""The library as it is documented: docstrings, docs/library.md, `help(ckptfix)`; examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ckptfix

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[1] / "docs" / "library.md"


def functions() -> Iterator[tuple[str, Any]]:
    """Every public function, and every public method of what the library gives out."""
    for name in sorted(ckptfix._HOME_OF):
        found = getattr(ckptfix, name)
        if inspect.isfunction(found):
            yield name, found
    for cls in (ckptfix.Checkpoint, ckptfix.LazyTensor, ckptfix.LazyStateDict):
        for name, found in vars(cls).items():
            if inspect.isfunction(found) and not name.startswith("_"):
                yield f"{cls.__name__}.{name}", found


FUNCTIONS = dict(functions())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which examples run, and the files that they speak of."""
    net = nn.Sequential(nn.Linear(3, 4))
    state = net.state_dict()
    torch.save(state, tmp_path / "model.pt")
    torch.save({"model": state, "epoch": 3}, tmp_path / "training.pt")
    torch.save(
        {"model": state, "model_ema": {key: value.clone() for key, value in state.items()}},
        tmp_path / "ema.pt",
    )
    torch.save(nn.DataParallel(net).state_dict(), tmp_path / "ddp.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented(name: str) -> None:
    function = FUNCTIONS[name]
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]
    assert "Raises:\n" in doc
    assert "Example:\n" in doc
    assert ("Args:\n" in doc) == bool(names)
    assert ("Returns:\n" in doc) == (signature.return_annotation != "None")
    if names:
        args = doc.partition("Args:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^    (\w+):", args, re.MULTILINE) == names
    for error in re.findall(r"\b[A-Z]\w+Error\b", doc.partition("Raises:\n")[2]):
        assert error == "TypeError" or hasattr(ckptfix, error)


@pytest.mark.parametrize("module", ["api", "loaders", "lazy"])
@pytest.mark.usefixtures("files")
def test_the_examples_run(module: str) -> None:
    finder = doctest.DocTestFinder()
    found = [
        one for one in finder.find(importlib.import_module(f"ckptfix.{module}")) if one.examples
    ]
    assert found
    for one in found:
        run(one)


def run(test: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.usefixtures("files")
def test_the_examples_of_the_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)


def test_the_page_names_everything_that_is_public() -> None:
    text = DOCS.read_text("utf-8")
    for name in (*ckptfix._HOME_OF, *FUNCTIONS):
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), name


def test_help_fits_two_screens_and_names_what_people_do() -> None:
    said = re.sub(".\b", "", pydoc.render_doc(ckptfix))
    assert len(said.splitlines()) <= 80
    assert len(re.findall(r"^ +ckptfix\.\w+\(", said, re.MULTILINE)) == 10


def test_a_star_does_not_hide_what_python_calls_open() -> None:
    code = "from ckptfix import *; import builtins; assert open is builtins.open"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_notebook_shows_a_table_and_nothing_of_the_file_is_taken_for_html(
    files: Path,
) -> None:
    torch.save({"<script>": {"a": torch.ones(1), "b": torch.ones(1)}}, files / "odd.pt")
    shown = ckptfix.open(files / "odd.pt")._repr_html_()
    assert "<table>" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


def test_a_checkpoint_and_a_report_print_a_few_lines(files: Path) -> None:
    assert repr(ckptfix.open("training.pt")).splitlines()[1:] == [
        "  model: model, 2 tensors, 64 bytes"
    ]
    many = {f"part{number}": nn.Linear(2, 2).state_dict() for number in range(100)}
    torch.save(many, files / "many.pt")
    assert len(repr(ckptfix.open("many.pt")).splitlines()) == 8
    net = nn.Sequential(nn.Linear(3, 4))
    assert repr(ckptfix.load_into(net, "ddp.pt")) == repr(
        net.load_state_dict(torch.load("model.pt"))
    )
    big = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    report = ckptfix.check(big, "model.pt")
    assert 5 < len(repr(report).splitlines()) < 20

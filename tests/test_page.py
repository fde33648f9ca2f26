"""The page of `inspect --html`: whole in itself, and safe to open whatever the keys say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptfix import door, page
from ckptfix.diffs.documents import diff as compare

FIXTURES = Path(__file__).parents[1] / "fixtures"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>"


def page_of(path: Path) -> str:
    return page.of_document(door.read(path))


def opened(page: str, folder: Path) -> str:
    """The page after its script has run, as a browser has it."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
        (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_it_needs_nothing_from_elsewhere() -> None:
    page = page_of(FIXTURES / "dataparallel_cuda_training.pt")
    assert not re.search(r"(?:src|href)=|https?:|@import|url\(", page)


def test_it_has_tensors_findings_and_commands() -> None:
    page = page_of(FIXTURES / "dataparallel_cuda.pt")
    assert "module.linears.0.weight" in page
    assert "ckptfix to-cpu" in page


def test_keys_cannot_leave_the_data(tmp_path: Path) -> None:
    torch.save({HOSTILE: torch.ones(1)}, tmp_path / "in.pt")
    made = page_of(tmp_path / "in.pt")
    assert made.count("</script>") == page.page("", [], [], [], []).count("</script>")
    assert "onerror" in made


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_the_map_and_the_table(tmp_path: Path) -> None:
    drawn = opened(page_of(FIXTURES / "resnet18_dataparallel_cuda.pt"), tmp_path)
    assert drawn.count('class="cell"') > 10
    assert drawn.count("<tr>") == 122
    assert "122 of 122" in drawn


def test_a_diff_tells_what_became_of_each_tensor(tmp_path: Path) -> None:
    before = {"same": torch.ones(3), "gone": torch.ones(2), "moved": torch.ones(4)}
    after = {"same": torch.ones(3), "new": torch.zeros(5), "moved": torch.tensor([1.0, 1, 1, 3])}
    for name, weights in (("a.pt", before), ("b.pt", after)):
        torch.save(weights, tmp_path / name)
    command = [sys.executable, "-m", "ckptfix", "diff", "a.pt", "b.pt", "--html", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    rows = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["tensors"]
    assert {row["key"]: (row["change"], row["by"]) for row in rows} == {
        "same": ("same", ""),
        "gone": ("removed", ""),
        "moved": ("values", "at most 2"),
        "new": ("added", ""),
    }


def test_a_page_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ckptfix", "inspect", str(FIXTURES / "cpu.pt"), "--html"]
    codes = [
        subprocess.run([*command, str(tmp_path / "p.html"), *more], capture_output=True).returncode
        for more in ([], [], ["--force"])
    ]
    assert codes == [0, 2, 0]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_what_changed_first_and_through_the_modules_around_it(
    tmp_path: Path,
) -> None:
    before = {"a.big": torch.ones(900), "a.small": torch.ones(100), "b.same": torch.ones(900)}
    for name, weights in (("a.pt", before), ("b.pt", {**before, "a.small": torch.zeros(100)})):
        torch.save(weights, tmp_path / name)
    documents = [door.read(tmp_path / name) for name in ("a.pt", "b.pt")]
    drawn = opened(page.of_diff(compare(*documents), *documents), tmp_path)
    assert re.findall(r'<td class="key">([^<]*)', drawn) == ["a.small", "a.big", "b.same"]
    cells = re.findall(r'title="(\w+): [^"]*" style="[^"]*(rgb\([^)]*\))', drawn)
    colours = dict(cells)
    assert colours["a"] == colours["small"] != colours["b"] == colours["same"] == colours["big"]
    assert '<h2 id="found" hidden="">' in drawn


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_runs_nothing_from_the_keys(tmp_path: Path) -> None:
    torch.save({HOSTILE: torch.ones(9), "__proto__.x": torch.ones(9)}, tmp_path / "in.pt")
    drawn = opened(page_of(tmp_path / "in.pt"), tmp_path)
    assert "<title>ckptfix report</title>" in drawn
    assert "2 of 2" in drawn

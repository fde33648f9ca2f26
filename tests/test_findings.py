"""The table of findings, and its documentation."""

from pathlib import Path

import pytest

from ckptfix.findings import CODES, Finding, as_markdown, with_errors

DOCS = Path(__file__).parents[1] / "docs"


def test_the_documentation_is_the_table() -> None:
    assert as_markdown() in (DOCS / "findings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", CODES)
def test_severity_comes_from_the_table(code: str) -> None:
    assert Finding(code, "message").severity is CODES[code].severity


@pytest.mark.parametrize("code", with_errors())
def test_every_code_is_used(code: str) -> None:
    package = DOCS.parent / "ckptfix"
    texts = [p.read_text("utf-8") for p in package.rglob("*.py") if p.name != "findings.py"]
    assert any(f'"{code}"' in text for text in texts)

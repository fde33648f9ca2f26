"""Findings, as lines for people and as rows for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptfix.cli.output import text
from ckptfix.door import beside
from ckptfix.findings import Severity
from ckptfix.hints import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from ckptfix.cli import answers
    from ckptfix.findings import Finding
    from ckptfix.hints import Command
    from ckptfix.tree.document import Document

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "cyan"}
_INDENT = " " * 8


def rows(findings: Sequence[Finding]) -> list[answers.Finding]:
    """Findings for JSON."""
    return [
        {
            "code": finding.code,
            "severity": finding.severity.value,
            "where": finding.where,
            "message": finding.message,
            "command": None if finding.command is None else str(finding.command),
        }
        for finding in findings
    ]


def errors(findings: Sequence[Finding]) -> int:
    """How many of them are errors."""
    return sum(finding.severity is Severity.ERROR for finding in findings)


def draw(
    console: Console, document: Document, findings: Sequence[Finding], *, commands: bool = True
) -> None:
    """Print findings after an empty line, each with the command that repairs it.

    Messages are wrapped; commands never are, so that they can be copied. Without `commands`, what
    repairs them all is said elsewhere.
    """
    given: list[Command] = []
    for finding in findings:
        if finding is findings[0]:
            console.print()
        console.print(_entry(finding))
        if finding.command is None or not commands:
            continue
        if finding.command in given:
            console.print(text(f"{_INDENT}the same command repairs it"))
        else:
            given.append(finding.command)
            _draw_command(console, finding.command)
    if sum(found.verb is not None for found in given) > 1:
        console.print(text("all     at once:"))
        _draw_command(console, command("fix", document.name, beside(document, "fixed")))


def _entry(finding: Finding) -> Table:
    from rich.table import Table

    where = "" if finding.where == "/" else f" ({finding.where})"
    label = text((f"{finding.severity:7}", _STYLES[finding.severity]))
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row(label, text((finding.code, "bold"), f"{where}: {finding.message}"))
    return table


def _draw_command(console: Console, found: Command) -> None:
    console.print(text(_INDENT, (str(found), "cyan")), soft_wrap=True)

"""How many branches the tests take, of each part that reads or writes files; `make coverage`.

coverage's own percentage counts lines and branches together, which hides branches behind lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PARTS = ("ckptfix/bytes/", "ckptfix/pickles/", "ckptfix/formats/", "ckptfix/layouts/")
WANTED = 95


def main(report: Path) -> int:
    """A line for each part in what `coverage json` wrote; 1 where one of them has too few."""
    files = json.loads(report.read_text("utf-8"))["files"]
    shares = []
    for part in PARTS:
        found = [row["summary"] for name, row in files.items() if name.startswith(part)]
        taken = sum(row["covered_branches"] for row in found)
        there = sum(row["num_branches"] for row in found)
        shares.append(100 * taken / there)
        print(f"{part:<20}{taken:>4} of {there:>3} branches, {shares[-1]:.1f} %")
    return int(min(shares) < WANTED)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

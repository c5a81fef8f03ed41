"""What was measured and what was not: rows printed as they come, a table and one JSON line at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `against` is what it is compared with ("1.12 x the floor"); `note` anything else."""

    part: str
    what: str
    value: float
    unit: str
    against: str = ""
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        return (self.what, number(self.value), self.unit, self.against, self.note)


def number(value: float) -> str:
    """Three or four figures, never an exponent."""
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    size = abs(value)
    return f"{value:.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}"


@dataclass
class Report:
    """Collects rows and prints each immediately, so that a run that is cut off has shown what it had."""

    machine: Mapping[str, Any]
    out: TextIO = field(default_factory=lambda: sys.stdout)
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def print(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.print("  " + "  ".join(cell for cell in row.cells() if cell))

    def not_measured(self, what: str, why: str) -> None:
        self.missing[what] = why
        self.print(f"  {what}: not measured, {why}")

    def finish(self, seconds: float) -> None:
        """The table, what was not measured, and the JSON line, which comes last."""
        self.print("")
        for line in table(("what", "value", "unit", "against", "note"), [row.cells() for row in self.rows]):
            self.print(line)
        for what, why in self.missing.items():
            self.print(f"not measured: {what} ({why})")
        self.print(self.json(seconds))

    def json(self, seconds: float) -> str:
        rows = [{k: v for k, v in asdict(row).items() if v != ""} for row in self.rows]
        document = {
            "machine": dict(self.machine),
            "rows": rows,
            "not_measured": self.missing,
            "seconds": round(seconds, 1),
        }
        return json.dumps(document)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return lines


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to measure. It is left out where less than `seconds` are left."""

    name: str
    run: Callable[[], None]
    seconds: float = 0.0


def run_parts(parts: Sequence[Part], report: Report, *, deadline: float) -> None:
    """Run `parts` in order. One that fails or comes too late is reported as not measured; the others still run."""
    for part in parts:
        left = deadline - time.monotonic()
        if left < part.seconds:
            report.not_measured(
                part.name, f"{max(left, 0):.0f} s of the budget were left and it needs {part.seconds:.0f}"
            )
            continue
        report.print(f"{part.name} ({left:.0f} s left)")
        try:
            part.run()
        except Exception as error:  # the other parts are still worth measuring
            first = " ".join(str(error).split())[:200]
            report.not_measured(part.name, f"it failed: {type(error).__name__}: {first}")

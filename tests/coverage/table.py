"""What became of each operator, and the committed table of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("table.json")
OUTCOMES = ("crash", "wrong", "refused", "exact", "no oracle")  # the first that a sample has is the operator's


@dataclass
class Verdict:
    """What became of an operator.

    ``outcome`` is ``exact`` (on every sample with a confirmed truth), ``refused`` (by a named error, on some),
    ``wrong``, ``crash``, ``no oracle``, or ``not floating`` (no sample has a floating-point input and output);
    ``served`` says by what, ``reason`` why it was refused or what is wrong.
    """

    name: str
    outcome: str = "not floating"
    samples: int = 0
    confirmed: int = 0
    refused: int = 0
    served: list[str] = field(default_factory=list)
    reason: str = ""

    def add(self, outcome: str, reason: str = "") -> None:
        """Count one sample; the worst decides."""
        if self.outcome == "not floating" or OUTCOMES.index(outcome) < OUTCOMES.index(self.outcome):
            self.outcome, self.reason = outcome, reason
        self.refused += outcome == "refused"

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome} ({self.confirmed} of {self.samples}) {self.reason}"


def write(verdicts: Iterable[Verdict], path: Path = TABLE) -> None:
    """One line for each operator, sorted by name."""
    rows = sorted(verdicts, key=lambda v: v.name)
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def read(path: Path = TABLE) -> dict[str, Verdict]:
    """The committed table by operator."""
    return {row["name"]: Verdict(**row) for row in json.loads(path.read_text())}

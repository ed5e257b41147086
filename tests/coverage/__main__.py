"""``python -m tests.coverage [names ..] [--samples N] [--jobs N] [--out FILE]``: sweep the operator database.

Each operator is judged in a process of its own, so that a crash or a changed global state stays there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.coverage.samples import operators
from tests.coverage.sweep import Verdict, judge

TABLE = Path(__file__).with_name("table.json")


def _judge(task: tuple[str, int | None]) -> Verdict:
    import torch

    torch.set_num_threads(1)
    name, most = task
    try:
        return judge(name, operators()[name], most)
    except Exception as error:  # a defect: anything that is not a named refusal
        return Verdict(
            name, "crash", reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="operators, all by default")
    parser.add_argument("--samples", type=int, default=None, help="at most so many samples of each operator")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table")
    options = parser.parse_args()
    names = options.names or list(operators())
    verdicts: dict[str, Verdict] = {}
    context = multiprocessing.get_context("fork")
    with context.Pool(options.jobs, maxtasksperchild=20) as pool:
        for verdict in pool.imap_unordered(_judge, [(name, options.samples) for name in names]):
            verdicts[verdict.name] = verdict
            print(f"{len(verdicts)}/{len(names)} {verdict.name}: {verdict.outcome} {verdict.reason}", flush=True)
    print(Counter(v.outcome for v in verdicts.values()))
    if options.out or not options.names:
        rows = [asdict(verdicts[name]) for name in sorted(verdicts)]
        (options.out or TABLE).write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(v.outcome in ("wrong", "crash") for v in verdicts.values()))


if __name__ == "__main__":
    main()

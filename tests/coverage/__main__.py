"""``python -m tests.coverage``: sweep the operator database and write the table that is committed.

python -m tests.coverage                          all operators, all samples: rewrites table.json
python -m tests.coverage NAMES --samples 3        some operators, a few samples of each: writes nothing
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from tests.coverage.precision import NEAR, judge_precision
from tests.coverage.samples import operators
from tests.coverage.sweep import judge, judge_all
from tests.coverage.table import TABLE, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="operators, all by default")
    parser.add_argument("--samples", type=int, default=None, help="at most so many samples of each operator")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--dtype", default="float64", help="float64, complex128, or one of lower precision")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table")
    options = parser.parse_args()
    names = options.names or list(operators())
    dtype = getattr(torch, options.dtype)
    verdicts = []
    for verdict in judge_all(
        names, partial(judge_precision if dtype in NEAR else judge, dtype=dtype), options.samples, options.jobs
    ):
        verdicts.append(verdict)
        print(f"{len(verdicts)}/{len(names)} {verdict}", flush=True)
    print(*(f"{outcome}: {count}" for outcome, count in Counter(v.outcome for v in verdicts).most_common()), sep=", ")
    if options.out or not (options.names or options.samples or dtype != torch.float64):
        write(verdicts, options.out or TABLE)
    sys.exit(any(v.outcome in ("wrong", "crash") for v in verdicts))


if __name__ == "__main__":
    main()

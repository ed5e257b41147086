"""The benchmark.

python -m benchmarks plane --quick                        value, slopes and K x K plane, against every peer
python -m benchmarks all --jax ~/jax/bin/python --fomoh ~/fomoh/src --jet ~/jet
python -m benchmarks plane --device cuda --models mlp --directions 3 --batches 256

Work: plane, step (one optimizer step), laplacian (with respect to inputs), memory, attention, compile, or all.
Every peer is optional: what is not there is left out with the reason. JSON and pictures go to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import compilation, laplacian, machine, problem, report, suite
from benchmarks.comparison import Row, compare, prepared
from benchmarks.contenders.base import Options
from benchmarks.models import MODELS, Model, attention, deep
from benchmarks.problem import Problem

#: What each preset measures.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "models": ["mlp"],
        "directions": [1, 3],
        "batches": [256],
        "dimensions": [10],
        "depths": [4, 16],
        "lengths": [1024, 2048],
        "rounds": 10,
        "seconds": 15.0,
    },
    "full": {
        "models": ["logistic", "cnn", "mlp", "deep-4", "deep-16", "deep-64", "gpt-2", "gpt-12", "resnet18"],
        "directions": [1, 2, 3, 8],
        "batches": [16, 256, 2048],
        "dimensions": [10, 100],
        "depths": [4, 8, 16, 32, 64],
        "lengths": [512, 1024, 2048, 4096],
        "rounds": 30,
        "seconds": 60.0,
    },
}

#: A batch of transformers or residual networks is this many times smaller: a sample has many tokens or pixels.
SMALLER = {"gpt": 16, "resnet18": 16}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("work", choices=[*WORK, "all"])
    made.add_argument("--quick", action="store_true", help="one model and few settings")
    made.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=" ".join(MODELS))
    made.add_argument("--directions", nargs="+", type=int, metavar="K")
    made.add_argument("--batches", nargs="+", type=int, metavar="N")
    made.add_argument("--dimensions", nargs="+", type=int, metavar="D", help="of the Laplacian")
    made.add_argument("--depths", nargs="+", type=int, metavar="L", help="of the memory of deep MLPs")
    made.add_argument("--lengths", nargs="+", type=int, metavar="L", help="of the sequences that attention looks at")
    made.add_argument("--curvature", nargs="+", choices=["hessian", "ggn"], default=["hessian", "ggn"])
    made.add_argument("--rank", type=int, help="of the directions in every matrix; by default they have no structure")
    made.add_argument("--contenders", nargs="+", default=["*"], metavar="PATTERN", help="names, * for any")
    made.add_argument("--rounds", type=int, help="at most")
    made.add_argument("--seconds", type=float, help="of each comparison, from which on fewer rounds will do")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    made.add_argument(
        "--precision", choices=["highest", "high"], default="highest", help="of float32 products on a GPU"
    )
    made.add_argument("--mode", help="of torch.compile, e.g. reduce-overhead for CUDA graphs")
    made.add_argument("--fomoh", type=Path, help="folder that holds the authors' package fomoh")
    made.add_argument("--jet", type=Path, help="folder that holds jet (jet-for-pytorch), if it is not installed")
    made.add_argument("--jax", type=Path, help="a Python interpreter that has JAX")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return made


@dataclass
class Session:
    """The settings, and the rows so far; they are written after each comparison, so that nothing is lost."""

    settings: argparse.Namespace
    work: str
    rows: list[Row] = field(default_factory=list)

    @property
    def options(self) -> Options:
        s = self.settings
        return Options(s.fomoh, s.jet, s.jax, s.mode)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        report.write(self.path("json"), machine.description(self.settings.device), self.rows)

    def path(self, ending: str) -> Path:
        s = self.settings
        return s.out / f"{self.work}-{s.device}-{s.dtype}.{ending}"

    def problem(self, model: str, samples: int, directions: int, curvature: problem.Curvature) -> Problem:
        chosen = MODELS[model]
        size = max(2, samples // SMALLER.get(chosen.kind, 1))
        s = self.settings
        return problem.make(chosen, size, directions, curvature, s.device, self.dtype, rank=s.rank)

    def common(self, made: Problem) -> Row:
        return {
            "work": self.work,
            "model": made.model.name,
            "batch": len(made.x),
            "directions": made.directions,
            "curvature": made.curvature,
            "rank": self.settings.rank,
        }

    def compare(
        self,
        contenders: suite.Contenders,
        arguments: Callable[[], tuple[Any, ...]],
        expected: Any,
        tolerance: float,
        common: Row,
    ) -> None:
        makers = {
            name: partial(_made, make, arguments, self.options)
            for name, make in suite.chosen(contenders, self.settings.contenders).items()
        }
        rows = compare(makers, expected, tolerance, common, self.settings.rounds, self.settings.seconds)
        print(report.comparison(rows), end="\n\n", flush=True)
        self.add(rows)


def _made(make: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], options: Options) -> Any:
    return make(*arguments(), options)


def plane(session: Session) -> None:
    s = session.settings
    for model, samples, k, curvature in product(s.models, s.batches, s.directions, s.curvature):
        made = session.problem(model, samples, k, curvature)
        session.compare(
            suite.PLANE, lambda made=made: (made,), problem.truth(made), made.tolerance, session.common(made)
        )
    report.picture(session.rows, session.path("png"))


def step(session: Session) -> None:
    """Every contender has parameters of its own, which it changes."""
    s = session.settings
    for model, samples, k, curvature in product(s.models, s.batches, s.directions, s.curvature):
        made = session.problem(model, samples, k, curvature)
        session.compare(
            suite.STEP, lambda made=made: (made.fresh(),), problem.truth(made), made.tolerance, session.common(made)
        )
    report.picture(session.rows, session.path("png"))


def laplacians(session: Session) -> None:
    s = session.settings
    for dimensions, samples in product(s.dimensions, s.batches):
        model, x = laplacian.make(dimensions, samples, s.device, session.dtype)
        common = {"work": session.work, "model": f"{dimensions} dimensions", "batch": samples}
        expected = {"laplacian": laplacian.truth(model, x)}
        rest = {"directions": None, "curvature": None, "rank": None}
        tolerance = problem.TOLERANCES[session.dtype]
        session.compare(suite.LAPLACIAN, lambda m=model, x=x: (m, x), expected, tolerance, {**common, **rest})
    report.picture(session.rows, session.path("png"))


def memories(session: Session) -> None:
    s = session.settings
    for depth in s.depths:
        _memory(session, suite.MEMORY, deep(depth), s.batches[0], "depth", depth)
    _curves(session, "depth")


def attentions(session: Session) -> None:
    """Memory and time over the length of the sequence, one sample."""
    for length in session.settings.lengths:
        made = _memory(session, suite.ATTENTION, attention(length), 1, "length", length)
        session.compare(
            suite.ATTENTION, lambda made=made: (made,), problem.truth(made), made.tolerance, session.common(made)
        )
    _curves(session, "length")


def _memory(
    session: Session, contenders: suite.Contenders, model: Model, samples: int, axis: str, value: int
) -> Problem:
    s = session.settings
    made = problem.make(model, samples, 1, device=s.device, dtype=session.dtype)
    makers = {
        name: partial(_made, make, lambda: (made.fresh(),), session.options)
        for name, make in suite.chosen(contenders, s.contenders).items()
    }
    runs, rows = prepared(makers, f"memory {model.name}", problem.truth(made), made.tolerance)
    for name, run in runs.items():
        rows[name] |= run.memory()
        run.close()
    session.add([{**session.common(made), axis: value, "contender": name, **row} for name, row in rows.items()])
    print(report.memories(session.rows[-len(rows) :]), end="\n\n", flush=True)
    return made


def _curves(session: Session, axis: str) -> None:
    rows = [row for row in session.rows if axis in row]
    report.curves(rows, axis, "peak_bytes", session.path("png"), 2**-20, "peak of one repetition, MiB")


def compilations(session: Session) -> None:
    s = session.settings
    for model, samples, k, curvature in product(s.models, s.batches[:1], s.directions, s.curvature):
        made = session.problem(model, samples, k, curvature)
        row = {**session.common(made), "contender": suite.BASE, **compilation.measure(made, session.options)}
        session.add([row])
        print(report.compiled(row), end="\n\n", flush=True)


WORK: dict[str, Callable[[Session], None]] = {
    "plane": plane,
    "step": step,
    "laplacian": laplacians,
    "memory": memories,
    "attention": attentions,
    "compile": compilations,
}


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    for name, value in PRESETS["quick" if settings.quick else "full"].items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    torch.set_float32_matmul_precision(settings.precision)
    for work in WORK if settings.work == "all" else [settings.work]:
        if work not in ("memory", "attention"):
            machine.keep_freed_memory()
        session = Session(settings, work)
        WORK[work](session)
        print(f"{session.path('json')}")


if __name__ == "__main__":
    main()

"""JAX, in an interpreter of its own that takes turns with this one."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Absent, Options
from benchmarks.problem import Problem

WORKER = Path(__file__).parents[1] / "workers" / "jax_worker.py"

#: A moment for the threads of the process that ran before to go to sleep.
REST = 0.01


class Worker:
    """A process of workers/jax_worker.py with one program."""

    def __init__(
        self,
        options: Options,
        work: str,
        kind: str,
        arrays: Mapping[str, Tensor],
        device: torch.device,
        **settings: Any,
    ) -> None:
        if options.jax is None:
            raise Absent("give a Python interpreter that has JAX with --jax")
        platform = {} if device.type == "cuda" else {"JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [str(options.jax), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **platform},
        )
        model_options = settings.pop("model_options", {})
        with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            np.savez(file, **{name: array.detach().cpu().numpy() for name, array in arrays.items()})
            file.flush()
            settings["x64"] = any(array.dtype == torch.float64 for array in arrays.values())
            settings["precision"] = torch.get_float32_matmul_precision()
            request = {"work": work, "kind": kind, "model_options": model_options, "options": settings}
            self.loaded = self.ask("load", arrays=file.name, **request)
        if device.type == "cuda" and "cpu" in self.loaded["device"].lower():
            self.close()
            raise Absent("this JAX has no GPU")

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Absent("the JAX process does not start") from None
        line = self.process.stdout.readline()
        if not line:
            raise Absent(f"the JAX process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise Absent(answer["error"])
        return answer

    def seconds(self) -> float:
        time.sleep(REST)
        taken = self.ask("time")["seconds"]
        time.sleep(REST)
        return taken

    def result(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self.ask("result").items()}

    def memory(self) -> dict[str, int | None]:
        """What XLA plans for."""
        return {"peak_bytes": self.loaded["temporary_bytes"], "process_peak_bytes": None}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _of(problem: Problem, options: Options, work: str, **settings: Any) -> Worker:
    if problem.dtype not in (torch.float32, torch.float64):
        raise Absent(f"is compared in float32 and float64, not {problem.dtype}")
    parameters = {f"p.{name}": p for name, p in problem.parameters.items()}
    tangents = {f"v.{name}": v for name, v in problem.tangents.items()}
    return Worker(
        *(options, work, problem.model.kind, {**parameters, **tangents, "x": problem.x, "y": problem.y}),
        problem.device,
        model_options=dict(problem.model.options),
        curvature=problem.curvature,
        **settings,
    )


def square(problem: Problem, options: Options) -> Worker:
    return _of(problem, options, "planes", form="square")


def pairs(problem: Problem, options: Options) -> Worker:
    if problem.directions == 1:
        raise Absent("at K = 1 the form over pairs is the other one")
    return _of(problem, options, "planes", form="pairs")


def gradient(problem: Problem, options: Options) -> Worker:
    return _of(problem, options, "gradient")


def step(problem: Problem, options: Options) -> Worker:
    return _of(problem, options, "step")


def laplacian(model: nn.Module, x: Tensor, options: Options) -> Worker:
    parameters = {f"p.{name}": p for name, p in model.named_parameters()}
    arrays = {**parameters, "x": x, "y": torch.zeros(1, dtype=torch.int64)}
    return Worker(options, "laplacian", "mlp", arrays, x.device)

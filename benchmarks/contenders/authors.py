"""The authors' fomoh: hyper-dual tensors, all pairs of directions as one batch, or one pair after the other."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Absent, Local, Options, plane_of
from benchmarks.problem import Problem


def package(options: Options) -> Any:
    """fomoh.nn, fomoh.opt and fomoh.hyperdual."""
    if options.fomoh is None:
        raise Absent("give the folder that holds the package with --fomoh")
    folder = str(options.fomoh)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("fomoh.nn"), importlib.import_module("fomoh.opt")
    except ImportError as error:
        raise Absent(f"{folder}: {error}") from error


def model_of(problem: Problem, options: Options) -> Any:
    """The same model in their layers, as their own DenseModel and CNNModel are written."""
    library, _ = package(options)
    layers = list(problem.module)

    class Sequential(library.Model):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [self.made(i, layer) for i, layer in enumerate(layers)]

        def made(self, at: int, layer: nn.Module) -> Any:
            names = [f"{at}.weight", f"{at}.bias"]
            match layer:
                case nn.Linear():
                    made = library.Linear(layer.in_features, layer.out_features, names=names)
                case nn.Conv2d(padding=(0, 0), stride=(1, 1)):
                    made = library.Conv2d(layer.out_channels, layer.in_channels, layer.kernel_size[0], names=names)
                case nn.Tanh() | nn.ReLU() | nn.MaxPool2d() | nn.Flatten():
                    return layer
                case _:
                    raise Absent(f"{type(layer).__name__} is not among the layers that are matched to the authors'")
            self.__setattr__(f"layer{at}", made)
            return made

        def __call__(self, x: Any, v1: Any, v2: Any = None, requires_grad: bool = False) -> Any:
            params = self.convert_params_to_htorch(v1, v1 if v2 is None else v2)
            i, batch = 0, None
            for layer in self.steps:
                if isinstance(layer, library.Conv2d):
                    x, i, batch = layer(x, params, i, batch)
                elif isinstance(layer, library.Linear):
                    x, i = layer(x, params, i)
                elif isinstance(layer, nn.MaxPool2d):
                    x = self.pooled(x, layer.kernel_size, batch)
                elif isinstance(layer, nn.Flatten):
                    size = x.shape[-3] * x.shape[-2] * x.shape[-1]
                    x = x.view(-1, size) if batch is None else x.view(batch, -1, size)
                else:
                    x = x.tanh() if isinstance(layer, nn.Tanh) else x.relu()
            return x.logsoftmax(-1)

        @staticmethod
        def pooled(x: Any, size: int, batch: int | None) -> Any:
            if len(x.shape) < 5:
                return x.maxpool2d(size, size)
            x = x.reshape(-1, *x.shape[2:]).maxpool2d(size, size)
            return x.reshape(batch, -1, *x.shape[1:])

    with torch.no_grad():
        model = Sequential()
        model.to(problem.device)
        model.nn_module_to_htorch_model(problem.module, verbose=False)
    return model


def _rows(problem: Problem) -> Tensor:
    """The directions as rows of a matrix, in the authors' layout: weights of linear layers are transposed."""
    parts = [v.mT if v.dim() == 3 else v for v in problem.tangents.values()]
    return torch.cat([part.flatten(1) for part in parts], 1)


def _plane(problem: Problem, options: Options, vectorized: bool) -> Local:
    if problem.curvature != "hessian":
        raise Absent("has no Gauss-Newton form")
    library, opt = package(options)
    model = model_of(problem, options)
    flatten = opt.flatten_loss_model_batched_vectorized if vectorized else opt.flatten_loss_model_batched
    function = flatten(model, library.nll_loss, problem.x, problem.y)
    directions, k = _rows(problem), problem.directions
    rows, columns = torch.triu_indices(k, k)
    theta = model.params_to_vec().expand(len(rows), -1)

    @torch.no_grad()
    def evaluate() -> Any:
        return function(library.htorch(theta, directions[rows], directions[columns]))[1]

    def finish(out: Any) -> dict[str, Tensor]:
        plane = torch.empty(k, k, dtype=problem.dtype, device=problem.device)
        plane[rows, columns] = plane[columns, rows] = out.eps1eps2
        return plane_of((out.real[0], out.eps2[:k], plane))  # the first K pairs are (0, j)

    return Local(evaluate, problem.device, finish)


def vectorized(problem: Problem, options: Options) -> Local:
    return _plane(problem, options, vectorized=True)


def sequential(problem: Problem, options: Options) -> Local:
    return _plane(problem, options, vectorized=False)


def step(problem: Problem, options: Options) -> Local:
    """Their own optimizer step, vectorised."""
    library, opt = package(options)
    model = model_of(problem, options)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return opt.optimizer_step_plane_Nd(
            *(model, library.nll_loss, 1, problem.x, problem.y),
            N=problem.directions,
            lr=1e-6,
            device=problem.device,
            vectorized=True,
        )[0]

    return Local(evaluate, problem.device, lambda value: {"value": value})

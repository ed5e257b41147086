"""Value, K slopes and the K x K curvature plane of a model's loss, against PyTorch's own transforms.

python benchmarks/plane.py --directions 3 --out plane.json

Contestants do the same work and are checked against each other in the same run. They run interleaved (A, B, A, B, ..)
after a warm-up; reported is the median of the paired ratios with its quartiles: a lone time means little on a shared
machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.functional import cross_entropy

import fomoh_fx

Plane = tuple[Tensor, Tensor, Tensor]


def mlp(width: int, depth: int) -> nn.Module:
    sizes = [784, *[width] * depth]
    layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def nested(model: nn.Module, x: Tensor, y: Tensor, tangents: dict[str, Tensor]) -> Callable[[], Plane]:
    """vmap(vmap(jvp(jvp))) of torch.func over all pairs of directions."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, p, (x,)), y)

    def pair(v: dict[str, Tensor], w: dict[str, Tensor]) -> Plane:
        def slope(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return jvp(loss, (p,), (v,))

        (value, first), (_, second) = jvp(slope, (parameters,), (w,))
        return value, first, second

    def plane(directions: dict[str, Tensor]) -> Plane:
        value, first, second = vmap(vmap(pair, in_dims=(None, 0)), in_dims=(0, None))(directions, directions)
        return value[0, 0], first[:, 0], second

    return lambda: plane(tangents)


def expansion(hd: fomoh_fx.HyperDualModule, x: Tensor, y: Tensor, tangents: dict[str, Tensor]) -> Callable[[], Plane]:
    def plane() -> Plane:
        out = hd(x, tangents=tangents, targets=(y,))
        return out.primal, out.tangent, out.hessian()

    return plane


def interleaved(contestants: dict[str, Callable[[], Plane]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directions", type=int, default=3)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = mlp(options.width, options.depth)
    x, y = torch.randn(options.batch, 784), torch.randint(0, 10, (options.batch,))
    tangents = {name: torch.randn(options.directions, *p.shape) * 0.01 for name, p in model.named_parameters()}
    eager = nested(model, x, y, tangents)
    contestants = {
        "fomoh_fx, compiled": expansion(fomoh_fx.compile(fomoh_fx.transform(model, cross_entropy)), x, y, tangents),
        "fomoh_fx, eager": expansion(fomoh_fx.transform(model, cross_entropy), x, y, tangents),
        "torch.func, nested, eager": eager,
        "torch.func, nested, compiled": torch.compile(eager),
    }
    with torch.no_grad():
        results = {}
        for name, run in contestants.items():
            results[name] = run()
            run()
        truth = results["torch.func, nested, eager"]
        for name, result in results.items():
            for part, expected in zip(result, truth, strict=True):
                torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        times = interleaved(contestants, options.rounds)

    base = times["fomoh_fx, compiled"]
    rows = {}
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {"seconds": statistics.median(mine), "ratio": middle, "quartiles": [low, high]}
        print(f"{name:30} {middle:6.2f} x  ({low:.2f} .. {high:.2f})   {1e3 * statistics.median(mine):8.1f} ms")
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options) | {"out": None}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

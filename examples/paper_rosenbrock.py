"""The paper's figures 1 and 2: one step and whole runs on Rosenbrock's function, in 2 and in 10 dimensions.

python examples/paper_rosenbrock.py     writes pictures and CSV files to examples/results
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

import fomoh_fx
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD, Newton

RESULTS = Path(__file__).with_name("results")

#: As in the paper every step stays, uphill or not; with --safe a step that raises the loss by a tenth is taken back.
LITERAL = {"largest_rise": None}

RACE = {
    "FGD": (FGD, {"lr": 1e-4}),
    "FoMoH": (FoMoH, {"lr": 1.0}),
    "FoMoH-BP": (FoMoHBP, {"lr": 1.0}),
    "FoMoH-2D": (FoMoHKD, {"lr": 1.0, "directions": 2}),
    "Newton": (Newton, {}),
}


class Rosenbrock(nn.Module):
    """sum_i 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2, whose minimum is 0 at (1, .., 1)."""

    def __init__(self, dimension):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self):
        x, y = self.at[:-1], self.at[1:]
        return (100 * (y - x**2) ** 2 + (1 - x) ** 2).sum()


def starts(count, dimension, seed=0):
    """Points ~ N(0, I), as the authors draw them."""
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(optimizer, hd, options, seed):
    """The optimizer; those without random directions take no seed."""
    return optimizer(hd, **options, **({} if optimizer in (FoMoHBP, Newton) else {"seed": seed}))


def run(optimizer, options, start, steps, seed):
    """The loss before each step, and after the last one."""
    model = Rosenbrock(len(start))
    hd = fomoh_fx.transform(model, second_order=optimizer.second_order)
    hd.load_state_dict({"at": start})
    opt = made(optimizer, hd, options, seed)
    losses = [opt.step() for _ in range(steps)]
    return torch.stack([*losses, model().detach()])


def race(methods, points, steps, label):
    """name -> the losses [start, step] of each method from the same points."""
    found = {}
    for name, (optimizer, options) in tqdm(methods.items(), label, unit="method", disable=None):
        found[name] = torch.stack([run(optimizer, options, p, steps, seed) for seed, p in enumerate(points)])
    return found


def median_run(losses):
    """The run whose loss is the median one at the end, and before that where ends are equal."""
    order = sorted(range(len(losses)), key=lambda i: losses[i].flip(0).tolist())
    return losses[order[len(order) // 2]]


def one_step(count):
    """Figure 1a: ``count`` steps of each method from one point, which random directions make differ."""
    start = starts(1, 2, seed=3)[0]
    model, steps = Rosenbrock(2), {}
    for name, (optimizer, options) in RACE.items():
        options = {**options, **LITERAL}
        hd = fomoh_fx.transform(model, second_order=optimizer.second_order)
        repeats = 1 if optimizer in (FoMoHBP, Newton) else count
        opt, taken = made(optimizer, hd, options, seed=0), []
        for _ in range(repeats):
            hd.load_state_dict({"at": start})
            opt.step()
            taken.append(model.at.detach() - start)
        steps[name] = torch.stack(taken)
    return start, steps


def draw_step(start, steps, path):
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    reach = 1.3 * max(float(steps["Newton"].norm()), float(steps["FoMoH-BP"].norm()))
    x = torch.linspace(float(start[0]) - reach, float(start[0]) + reach, 200)
    y = torch.linspace(float(start[1]) - reach, float(start[1]) + reach, 200)
    value = 100 * (y[:, None] - x**2) ** 2 + (1 - x) ** 2
    axes.contour(x, y, value.log10(), levels=20, colors="lightgray", linewidths=0.6)
    for color, (name, taken) in zip(("C0", "C1", "C2", "C4", "C3"), steps.items(), strict=True):
        ends, mean = start + taken, start + taken.mean(0)
        if len(taken) > 1:
            axes.scatter(ends[:, 0], ends[:, 1], s=3, alpha=0.3, color=color)
        axes.plot([start[0], mean[0]], [start[1], mean[1]], color=color, lw=2, label=name)
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), title="One step: samples and their mean")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_race(found, path, title, highlight):
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    colors = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(found)).tolist())
    for color, (name, losses) in zip(colors, found.items(), strict=True):
        step = range(1, losses.shape[1] + 1)
        if highlight:
            for one in losses:
                axes.loglog(step, one.clamp(min=1e-32), color=color, lw=0.3, alpha=0.5)
        middle = median_run(losses) if highlight else losses.median(0).values
        axes.loglog(step, middle.clamp(min=1e-32), color=color, lw=2, label=name, ls="--" if name == "Newton" else "-")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def write(found, path):
    """The median loss of each method, at steps that grow by a tenth."""
    steps = sorted({int(1.1**i) for i in range(200)})
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *found])
        medians = {name: losses.median(0).values for name, losses in found.items()}
        length = next(iter(medians.values())).shape[0]
        for step in (s for s in steps if s <= length):
            rows.writerow([step, *(f"{float(m[step - 1]):.4g}" for m in medians.values())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=10, help="random starts of each method (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run (%(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="sampled steps in figure 1a (%(default)s)")
    parser.add_argument("--safe", action="store_true", help="take back steps that raise the loss by a tenth")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rule, mark = ({}, "_safe") if options.safe else (LITERAL, "")

    if not options.safe:
        start, steps = one_step(options.samples)
        draw_step(start, steps, options.out / "rosenbrock_step.png")
        for name, taken in steps.items():
            (x, y), spread = taken.mean(0).tolist(), float(taken.std(0, correction=0).norm())
            print(f"one step of {name:9} mean ({x:+.4f}, {y:+.4f})  deviation {spread:.4f}")

    two = {name: (optimizer, {**chosen, **rule}) for name, (optimizer, chosen) in RACE.items()}
    ten = {f"FoMoH-{k}D": (FoMoHKD, {"lr": 1.0, "directions": k, **rule}) for k in range(2, 11)}
    ten["Newton"] = (Newton, rule)
    draw = {"rosenbrock_2d": (two, 2, True), "rosenbrock_10d": (ten, 10, False)}
    for name, (methods, dimension, highlight) in draw.items():
        found = race(methods, starts(options.starts, dimension), options.steps, name)
        title = f"Rosenbrock in {dimension} dimensions, {options.starts} starts"
        draw_race(found, options.out / f"{name}{mark}.png", title, highlight)
        write(found, options.out / f"{name}{mark}.csv")
        print(f"\n{name}{mark}: median loss after")
        at = [s for s in (10, 30, 100, 300, 1000, 3000) if s <= options.steps]
        print(" " * 10 + "".join(f"{s:>12}" for s in at))
        for method, losses in found.items():
            print(f"{method:10}" + "".join(f"{float(losses[:, s].median()):12.3g}" for s in at))


if __name__ == "__main__":
    main()

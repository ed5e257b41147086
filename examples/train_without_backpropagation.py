"""Training by forward passes only, next to SGD with backpropagation at several rates, over seeds.

python examples/train_without_backpropagation.py mlp --data DIR        784-100-10 on MNIST
python examples/train_without_backpropagation.py logistic --data DIR   784-10 on MNIST
python examples/train_without_backpropagation.py cnn --data DIR        the paper's CNN on MNIST
python examples/train_without_backpropagation.py text                  a small transformer on Python's own manual

DIR has MNIST's four IDX files, gzipped or not. Pictures, CSV and JSON files go to examples/results.
"""

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from tasks import TASKS
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fomoh_fx
from fomoh_fx.optim import FoMoHKD

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS = Path(__file__).with_name("results")
FIGURES = ("training_loss", "test_loss", "test_accuracy")  # of every epoch
WARM_UP, TIMED = 4, 20  # steps


@dataclass(frozen=True)
class Method:
    """FoMoH-KD at its defaults along directions guessed from activities, or SGD with backpropagation at a rate."""

    rate: float | None = None
    momentum: float = 0.0

    @property
    def name(self):
        if self.rate is None:
            return "forward passes only"
        return f"SGD {self.rate:g}" + f", momentum {self.momentum:g}" * bool(self.momentum)


def forward_only(model, loss, eager):
    """A step without a gradient by a backward pass, without an autograd graph; and the optimizer."""
    hd = fomoh_fx.transform(model, loss)
    optimizer = FoMoHKD(hd if eager else fomoh_fx.compile(hd), sampler="activity")
    return lambda x, y: optimizer.step(x, targets=(y,)), optimizer


def backpropagation(model, loss, method, eager):
    optimizer = torch.optim.SGD(model.parameters(), lr=method.rate, momentum=method.momentum)
    run = model if eager else torch.compile(model)

    def step(x, y):
        optimizer.zero_grad()
        value = loss(run(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step, None


def started(task, method, eager, device, seed):
    torch.manual_seed(seed)
    model = task.build().to(device)
    if method.rate is None:
        return model, *forward_only(model, task.loss, eager)
    return model, *backpropagation(model, task.loss, method, eager)


def loaded(task, options):
    if options.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.jobs))
    else:
        torch.set_float32_matmul_precision("highest")
    parts = list(task.data(options.data))
    if options.samples:
        parts[:2] = [part[: options.samples] for part in parts[:2]]
    parts = [part.to(options.device) for part in parts]
    forget_peak(options.device)
    return parts


@torch.no_grad()
def measured(model, loss, x, y):
    """Loss and accuracy."""
    parts = [model(part) for part in x.split(512)]
    outputs = torch.cat(parts)
    return loss(outputs, y).item(), (outputs.argmax(-1) == y).float().mean().item()


def train(run, options):
    """The figures of every epoch, and what else a run tells."""
    method, seed = run
    task = TASKS[options.task]
    x, y, test_x, test_y = loaded(task, options)
    model, step, optimizer = started(task, method, options.eager, options.device, seed)
    generator, rows, losses = torch.Generator().manual_seed(seed), [], []
    start = time.perf_counter()
    for _ in range(options.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        chosen = [part for part in order.split(options.batch) if len(part) == options.batch]
        losses.append(torch.stack([step(x[part], y[part]) for part in chosen]))
        rows.append((losses[-1].mean().item(), *measured(model, task.loss, test_x, test_y)))
    every = torch.cat(losses)
    told = {
        "seconds": time.perf_counter() - start,
        "steps": len(every),
        "first_loss": every[0].item(),
        "largest_loss": every.max().item(),
        "peak_memory": peak_memory(options.device),
    }
    if optimizer is not None:
        told |= {"skipped": optimizer.skipped, "refused": optimizer.refused}
    return {"method": method.name, "seed": seed, **told, "epochs": [dict(zip(FIGURES, r, strict=True)) for r in rows]}


def forget_peak(device):
    """Count the peak from here: loading took more."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes: of the CUDA allocator, or all that is resident of this process (which has run nothing else)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def cost(method, options):
    """What one step takes, alone on the machine: seconds, memory, and floating-point operations against one forward."""
    task = TASKS[options.task]
    x, y, *_ = loaded(task, options)
    x, y = x[: options.batch], y[: options.batch]
    model, step, _ = started(task, method, options.eager, options.device, 0)
    seconds = timed(lambda: step(x, y), options.device)
    memory = peak_memory(options.device)
    run = model if options.eager else torch.compile(model)
    with torch.no_grad():
        forward = timed(lambda: task.loss(run(x), y), options.device)
    model, step, _ = started(task, method, True, options.device, 0)  # operators that a kernel fuses are not counted
    step(x, y)
    with FlopCounterMode(display=False) as of_step:
        step(x, y)
    with torch.no_grad(), FlopCounterMode(display=False) as of_forward:
        task.loss(model(x), y)
    return {
        "method": method.name,
        "seconds_per_step": seconds,
        "seconds_per_forward": forward,
        "peak_memory": memory,
        "flops_per_step": of_step.get_total_flops(),
        "flops_per_forward": of_forward.get_total_flops(),
        "forward_equivalents": of_step.get_total_flops() / of_forward.get_total_flops(),
        "forward_equivalents_in_time": seconds / forward,
    }


def timed(run, device):
    """The median of some calls after others that warm up."""
    taken = []
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UP:])


def spread(values):
    """Mean and standard deviation; NaN where a run diverged."""
    figures = torch.tensor(values, dtype=torch.float64)
    return figures.mean().item(), figures.std().item() if len(values) > 1 else 0.0


def summary(methods, runs, costs):
    """One row for each method: the last epoch over seeds, and what it costs."""
    rows = []
    for method in methods:
        own = [run for run in runs if run["method"] == method.name]
        row = {"method": method.name, "seeds": len(own)}
        for figure in FIGURES:
            row[figure], row[f"{figure}_deviation"] = spread([run["epochs"][-1][figure] for run in own])
        row["seconds"] = statistics.mean(run["seconds"] for run in own)
        row["largest_rise"] = max(run["largest_loss"] / run["first_loss"] for run in own)
        row["skipped"], row["refused"] = (sum(run.get(what, 0) for run in own) for what in ("skipped", "refused"))
        found = next((c for c in costs if c["method"] == method.name), {})
        rows.append(row | {k: v for k, v in found.items() if k != "method"})
    return rows


def best(rows, start):
    """The best of the methods whose names start so, by test loss."""
    own = [row for row in rows if row["method"].startswith(start) and row["test_loss"] == row["test_loss"]]
    return min(own, key=lambda row: row["test_loss"], default=None)


def table(rows):
    lines = [f"{'':28}{'test loss':>18}{'test accuracy':>18}{'s a run':>9}{'forwards':>10}{'in time':>9}{'MiB':>8}"]
    for r in rows:
        figures = "".join(f"{r[f]:>10.4f} ± {r[f + '_deviation']:.4f}" for f in FIGURES[1:])
        price = ""
        if "forward_equivalents" in r:
            price = f"{r['forward_equivalents']:>10.1f}{r['forward_equivalents_in_time']:>9.1f}"
            price += f"{r['peak_memory'] / 2**20:>8.0f}"
        lines.append(f"{r['method']:28}{figures}{r['seconds']:>9.1f}{price}")
        if r["skipped"] or r["refused"]:
            lines[-1] += f"  ({r['skipped']} steps skipped, {r['refused']} taken back)"
    return "\n".join(lines)


def picture(options, rows, runs):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name in zip(axes, FIGURES, strict=True):
        for row in rows:
            curves = [[e[name] for e in run["epochs"]] for run in runs if run["method"] == row["method"]]
            middle = torch.tensor(curves).mean(0)
            wide = 2.5 if row["method"].startswith("forward") else 1
            (line,) = axis.plot(range(1, len(middle) + 1), middle, linewidth=wide, label=row["method"])
            low, high = (edge(torch.tensor(curves), 0).values for edge in (torch.min, torch.max))
            axis.fill_between(range(1, len(middle) + 1), low, high, color=line.get_color(), alpha=0.2)
        axis.set(xlabel="epoch", title=name.replace("_", " "))
        if "loss" in name:
            axis.set_ylim(0, min(3.0, runs[0]["first_loss"]))
    axes[1].legend(fontsize=7)
    figure.savefig(options.out / f"{options.name}.png", dpi=110)


def write(options, methods, runs, costs):
    """The JSON and CSV files, of all that is done."""
    rows = summary([m for m in methods if any(run["method"] == m.name for run in runs)], runs, costs)
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.processor() or platform.machine()}"
    versions = {"machine": name, "torch": torch.__version__, "python": platform.python_version()}
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "data", "name")}
    tuned = {start: (best(rows, start) or {}).get("method") for start in ("SGD",)}
    figures = {**settings, **versions, "tuned": tuned, "summary": rows, "costs": costs, "runs": runs}
    (options.out / f"{options.name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    with (options.out / f"{options.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "epoch", *FIGURES])
        for run in runs:
            for i, epoch in enumerate(run["epochs"]):
                writer.writerow([run["method"], run["seed"], i + 1, *(f"{epoch[f]:.5f}" for f in FIGURES)])
    return rows


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST's four IDX files")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--samples", type=int, help="only the first training samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="*", help="of SGD, instead of the task's")
    parser.add_argument("--momentum-rates", type=float, nargs="*", help="of SGD with a momentum of 0.9, likewise")
    parser.add_argument("--only-backpropagation", action="store_true", help="SGD alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--eager", action="store_true", help="do not compile with Inductor")
    parser.add_argument("--no-cost", action="store_true", help="do not measure what a step costs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    task = TASKS[options.task]
    options.epochs, options.batch = options.epochs or task.epochs, options.batch or task.batch
    options.rates = task.rates if options.rates is None else options.rates
    options.momentum_rates = task.momentum_rates if options.momentum_rates is None else options.momentum_rates
    options.name = f"forward_only_{options.task}" + f"_{options.batch}" * (options.batch != task.batch)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def pool(workers):
    """Processes that serve one run each, so that what one takes of memory is its own."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def main():
    options = parsed()
    plain, with_momentum = [Method(r) for r in options.rates], [Method(r, 0.9) for r in options.momentum_rates]
    forward = [] if options.only_backpropagation else [Method()]
    methods = [*forward, *plain, *with_momentum]
    runs, costs = [], []
    with pool(options.jobs) as processes:
        work = [processes.submit(train, (m, seed), options) for m in methods for seed in options.seeds]
        for finished in tqdm(as_completed(work), total=len(work), unit="run", disable=None):
            runs.append(finished.result())
            write(options, methods, runs, costs)
    if not options.no_cost:
        with pool(1) as processes:  # one after the other: each alone
            costs = list(processes.map(partial(cost, options=options), [*forward, *plain[:1], *with_momentum[:1]]))
        same = {kind[0].name: kind for kind in (plain, with_momentum) if kind}
        costs += [c | {"method": m.name} for c in costs for m in same.get(c["method"], [])[1:]]
    rows = write(options, methods, runs, costs)
    picture(options, rows, runs)
    print(f"\n{options.task}, {options.epochs} epochs, batch {options.batch}\n{table(rows)}")


if __name__ == "__main__":
    main()

"""The paper's tables 1 and 2 (figures 3, 4, 6, 7), and the authors' notebook: every method on MNIST, over seeds.

python examples/paper_mnist.py logistic --data DIR      table 1: 7,850 parameters
python examples/paper_mnist.py cnn --data DIR           table 2: 431,080 parameters
python examples/paper_mnist.py notebook --data DIR      784-100-10, K = 2, rate 0.8, 20 epochs: validation NLL 0.600

Without --data they take the digits that scikit-learn ships. Pictures, CSV and JSON files go to examples/results.
"""

import argparse
import csv
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from data import digits, mnist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from tqdm import tqdm

import fomoh_fx
from fomoh_fx.optim import FGD, FoMoH, FoMoHBP, FoMoHKD

RESULTS = Path(__file__).with_name("results")
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels

#: A figure of every epoch.
COLUMNS = ("training_loss", "validation_loss", "training_accuracy", "validation_accuracy")


def logistic(side):
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 10))


def cnn(side):
    """Convolutions of 5 x 5, or of 3 x 3 where the images are small."""
    kernel = 5 if side >= 28 else 3
    left = ((side - kernel + 1) // 2 - kernel + 1) // 2
    return nn.Sequential(
        *(nn.Unflatten(1, (1, side)), nn.Conv2d(1, 20, kernel), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, kernel, padding=0 if left else 1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(50 * max(left, 1) ** 2, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def notebook(side):
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 100), nn.ReLU(), nn.Linear(100, 10))


def plane(count):
    return lambda hd, lr, seed: FoMoHKD(hd, lr, directions=count, seed=seed, largest_rise=None)


#: As in the paper no step is taken back.
METHODS = {
    "FGD": lambda hd, lr, seed: FGD(hd, lr, seed=seed),
    "FoMoH": lambda hd, lr, seed: FoMoH(hd, lr, seed=seed, eps=1e-5, largest_rise=None),
    "FoMoH-2D": plane(2),
    "FoMoH-3D": plane(3),
    "FoMoH-BP": lambda hd, lr, seed: FoMoHBP(hd, lr, eps=1e-5, largest_rise=None),
    "Backpropagation": None,
}
SCHEDULED = ("FGD", "FoMoH", "FoMoH-2D", "FoMoH-3D")

#: Model, epochs by default, and rate and batch of each method: the paper's tables 3 and 4.
TASKS = {
    "logistic": (logistic, 50, {
        "FGD": (6.497e-5, 128), "FoMoH": (0.1362, 1024), "FoMoH-2D": (0.04221, 512), "FoMoH-3D": (0.1, 512),
        "FoMoH-BP": (0.04688, 2048), "Backpropagation": (0.03561, 2048),
    }),
    "cnn": (cnn, 6, {
        "FGD": (1.376e-4, 2048), "FoMoH": (0.542, 2048), "FoMoH-2D": (0.3032, 2048), "FoMoH-3D": (0.3032, 2048),
        "FoMoH-BP": (0.04688, 2048), "Backpropagation": (0.03561, 2048),
    }),
    "notebook": (notebook, 20, {"FoMoH-2D": (0.8, 2048)}),
}  # fmt: skip


class Backpropagation:
    """SGD with the interface of our optimizers."""

    def __init__(self, model, lr):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr)

    def step(self, x, targets):
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), *targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def scheduler_of(task, optimizer, epochs):
    """Logistic regression: a tenth at the epoch where the validation loss rises; the CNN: at every third of the run."""
    if task == "logistic":
        return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0)
    return StepLR(optimizer, max(1, epochs // 3), 0.1)


@torch.no_grad()
def measured(model, images, labels):
    """Loss and accuracy."""
    outputs = torch.cat([model(part) for part in images.split(2048)])
    return cross_entropy(outputs, labels).item(), (outputs.argmax(1) == labels).float().mean().item()


@cache
def tensors(folder, samples, device):
    """Training images, their labels, and the test's: normalised."""
    images, labels, test_images, test_labels = mnist(folder) if folder else digits()
    images, labels = images[:samples], labels[:samples]
    parts = [(images - MEAN) / DEVIATION, labels, (test_images - MEAN) / DEVIATION, test_labels]
    return [part.to(device) for part in parts]


def train(run, task, epochs, options):
    """The figures of every epoch, a list of rows as in COLUMNS, and the seconds of the run."""
    method, scheduled, seed = run
    build, _, rates = TASKS[task]
    images, labels, test_images, test_labels = tensors(options.data, options.samples, options.device)
    start = time.perf_counter()
    torch.manual_seed(seed)
    model, (lr, batch) = build(images.shape[1]).to(images.device), rates[method]
    if METHODS[method] is None:
        optimizer = Backpropagation(model, lr)
        scheduler = scheduler_of(task, optimizer.optimizer, epochs) if scheduled else None
    else:
        hd = fomoh_fx.transform(model, cross_entropy)
        optimizer = METHODS[method](hd if options.eager else fomoh_fx.compile(hd), lr, seed)
        scheduler = scheduler_of(task, optimizer, epochs) if scheduled else None
    rows = []
    for _ in range(epochs):
        order = torch.randperm(len(images), device=images.device)
        for chosen in order.split(min(batch, len(images))):
            if len(chosen) == min(batch, len(images)):  # one shape, one program
                optimizer.step(images[chosen], targets=(labels[chosen],))
        (loss, accuracy), (test_loss, test_accuracy) = (
            measured(model, images, labels), measured(model, test_images, test_labels),
        )  # fmt: skip
        rows.append((loss, test_loss, accuracy, test_accuracy))
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(test_loss)
        elif scheduler is not None:
            scheduler.step()
    return rows, time.perf_counter() - start


def order_of(task, run):
    """As in the paper's tables."""
    method, scheduled, seed = run
    return list(TASKS[task][2]).index(method), scheduled, seed


def saved(path, epochs):
    """The runs of an earlier call with as many epochs."""
    known = json.loads(path.read_text()) if path.exists() else {"epochs": None}
    return {tuple(run["of"]): run for run in known["runs"]} if known["epochs"] == epochs else {}


def spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def report(task, epochs, done, path):
    """The table of the last epoch, the mean curves, and pictures of them, of all runs that are done."""
    curves = {}
    for (method, scheduled, seed), run in sorted(done.items(), key=lambda item: order_of(task, item[0])):
        curves.setdefault(method + " (schedule)" * scheduled, {})[seed] = run
    seeds = sorted({seed for runs in curves.values() for seed in runs})
    lines = [f"{task}, {epochs} epochs, seeds {', '.join(map(str, seeds))}: mean and standard deviation"]
    lines.append(f"{'':26}" + "".join(f"{c.replace('_', ' '):>22}" for c in COLUMNS) + f"{'s a run':>10}")
    for name, runs in curves.items():
        last = [spread([run["rows"][-1][i] for run in runs.values()]) for i in range(len(COLUMNS))]
        cells = "".join(f"{mean:>13.4f} ± {deviation:.4f}" for mean, deviation in last)
        lines.append(f"{name:26}{cells}{statistics.mean(run['seconds'] for run in runs.values()):>10.0f}")
    print("\n".join(["", *lines]))
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "epoch", *COLUMNS])
        for name, runs in curves.items():
            for epoch, rows in enumerate(zip(*(run["rows"] for run in runs.values()), strict=True)):
                writer.writerow(
                    [name, epoch + 1, *(f"{statistics.mean(column):.5f}" for column in zip(*rows, strict=True))]
                )
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for i, (axis, column) in enumerate(zip(axes.flat, COLUMNS, strict=True)):
        for j, (name, runs) in enumerate(curves.items()):
            mean = torch.tensor([[row[i] for row in run["rows"]] for run in runs.values()]).mean(0)
            style = "--" if "schedule" in name else "-"
            axis.plot(range(1, epochs + 1), mean, style, color=f"C{j}", label=name)
        axis.set(xlabel="epoch", title=column.replace("_", " "))
        if "loss" in column:
            axis.set_ylim(0, 2.5)
    axes[0, 1].legend(fontsize=7)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST's four IDX files")
    parser.add_argument("--epochs", type=int, help="the paper has 2000 (logistic) and 3000 (cnn)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON file has, and add to them")
    parser.add_argument("--samples", type=int, help="only the first training images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of its own")
    parser.add_argument("--eager", action="store_true", help="do not compile with Inductor")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="of these results, beside others of the task")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    _, epochs, rates = TASKS[options.task]
    epochs = options.epochs or epochs
    names = [name for name in rates if options.methods is None or name in options.methods]
    curves = [(name, scheduled) for name in names for scheduled in (False, True)]
    curves = [(name, s) for name, s in curves if not s or (name in SCHEDULED and options.task != "notebook")]
    runs = [(name, scheduled, seed) for name, scheduled in curves for seed in options.seeds]

    path = options.out / f"mnist_{'_'.join(filter(None, (options.task, options.name)))}.json"
    done = saved(path, epochs) if options.resume else {}
    runs = [run for run in runs if run not in done]
    work = partial(train, task=options.task, epochs=epochs, options=options)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        started = {pool.submit(work, run): run for run in runs}
        for finished in tqdm(as_completed(started), total=len(runs), unit="run", disable=None):
            rows, seconds = finished.result()
            rows = [[round(figure, 5) for figure in row] for row in rows]
            run = started[finished]
            done[run] = {"of": run, "seconds": round(seconds, 1), "rows": rows}
            path.write_text(json.dumps({"epochs": epochs, "columns": COLUMNS, "runs": list(done.values())}))
    report(options.task, epochs, done, path)


if __name__ == "__main__":
    main()

"""Train a digit classifier with forward passes only: transform, read the code, compile, train with FoMoH-KD.

python examples/train_digits.py               the handwritten digits that scikit-learn ships; no download
python examples/train_digits.py --data DIR    MNIST's four IDX files, gzipped or not
"""

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from data import digits, mnist
from torch import nn
from tqdm import tqdm

import fomoh_fx
from fomoh_fx.optim import FoMoHKD

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HIDDEN, BATCH = 32, 2048


def show(hd, images, labels, directions):
    """The generated code of the last layer, and how many nodes compute which component."""
    tangents = {name: torch.zeros(directions, *p.shape) for name, p in hd.named_parameters()}
    hd.trace(images, tangents=tangents, targets=(labels,))
    print("The last layer, as generated:\n")
    print("\n".join(line for line in hd.code.splitlines() if line.startswith("    linear_1")))
    print(f"\n{hd.report()}")


def can_compile():
    """Whether Inductor finds a C++ compiler that works."""
    try:
        torch.compile(torch.cos)(torch.ones(8))
    except Exception:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="a folder with MNIST's four IDX files")
    parser.add_argument("--epochs", type=int, help="passes over the data (300; 40 with --data)")
    parser.add_argument("--directions", type=int, default=8, help="K, the dimension of the plane (%(default)s)")
    parser.add_argument(
        "--lr", type=float, default=0.5, help="which part of the plane's best step to take (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=Path(__file__).with_suffix(".png"), help="the picture (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile with Inductor")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = mnist(options.data) if options.data else digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    batch = min(BATCH, len(images))

    hd = fomoh_fx.transform(model, nn.functional.cross_entropy, curvature="ggn")
    show(hd, images[:batch], labels[:batch], options.directions)
    if not options.eager and can_compile():
        hd = fomoh_fx.compile(hd)
    elif not options.eager:
        print("There is no working C++ compiler, so the graph runs operator by operator.")

    optimizer = FoMoHKD(hd, lr=options.lr, directions=options.directions, previous_step=True)
    losses, accuracies, start = [], [], time.perf_counter()
    progress = tqdm(range(options.epochs or (40 if options.data else 300)), unit="epoch", disable=None)
    for _ in progress:
        for chosen in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            losses.append(optimizer.step(images[chosen], targets=(labels[chosen],)).item())
        with torch.no_grad():
            accuracies.append((model(test_images).argmax(1) == test_labels).float().mean().item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}")
    print(f"{len(losses)} steps in {time.perf_counter() - start:.0f} s")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="step", ylabel="training loss")
    right.plot(range(1, len(accuracies) + 1), accuracies)
    right.set(xlabel="epoch", ylabel="test accuracy")
    figure.savefig(options.out, dpi=120)
    print(f"training curve: {options.out}")
    print(f"test accuracy: {accuracies[-1]:.2f}")


if __name__ == "__main__":
    main()

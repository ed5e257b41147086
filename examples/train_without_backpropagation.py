"""MNIST by forward passes only, next to SGD with backpropagation: FoMoH-KD along directions guessed from activities.

python examples/train_without_backpropagation.py --data DIR     MNIST's four IDX files, gzipped or not
"""

import argparse
import time

import torch
from data import mnist
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fomoh_fx
from fomoh_fx.optim import FoMoHKD

MODELS = {
    "logistic": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
    "cnn": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    ),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)),
}


def forward_only(model):
    """A step of FoMoH-KD at its defaults: no gradient by a backward pass, no autograd graph."""
    optimizer = FoMoHKD(fomoh_fx.compile(fomoh_fx.transform(model, cross_entropy)), sampler="activity")
    return lambda x, y: optimizer.step(x, targets=(y,))


def backpropagation(model, lr):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step(x, y):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", required=True, help="a folder with MNIST's four IDX files")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sgd", type=float, metavar="LR", help="train by backpropagation at this rate instead")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    images, labels, test_images, test_labels = mnist(options.data)
    model = MODELS[options.model]()
    step = backpropagation(model, options.sgd) if options.sgd else forward_only(model)
    start = time.perf_counter()
    for epoch in tqdm(range(options.epochs), unit="epoch", disable=None):
        total = 0.0
        batches = torch.randperm(len(images)).split(options.batch)[: len(images) // options.batch]
        for chosen in batches:
            total += step(images[chosen], labels[chosen]).item()
        with torch.no_grad():
            z = model(test_images)
        accuracy, loss = (z.argmax(1) == test_labels).float().mean(), cross_entropy(z, test_labels)
        seconds = time.perf_counter() - start
        tqdm.write(
            f"epoch {epoch + 1:2}  training loss {total / len(batches):.4f}  test loss {loss:.4f}  "
            f"test accuracy {accuracy:.4f}  {seconds:.0f} s"
        )


if __name__ == "__main__":
    main()

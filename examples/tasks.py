"""What is trained without backpropagation: models, data, losses, and the rates among which SGD is tuned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from data import manual, mnist
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels
CONTEXT = 64  # characters
CHARACTERS = 96  # what is rarer shares one


def logistic():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))


def cnn():
    """The paper's: 431,080 parameters."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


class Block(nn.Module):
    """Causal attention, then an MLP, each on a normalised copy of what it adds to."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        split = self.query_key_value(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.transpose(1, 3).unbind(2)
        x = x + self.out(self.attended(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))

    def attended(self, q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class OwnPlaceBlock(Block):
    """The same values, but no derivative in the keys and values of other places."""

    def attended(self, q, k, v):
        scores = q @ k.detach().mT + torch.diag_embed((q * (k - k.detach())).sum(-1))
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights = (scores * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        return weights @ v.detach() + weights.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * (v - v.detach())


class Transformer(nn.Module):
    """Two blocks over characters."""

    def __init__(self, width=64, heads=4, blocks=2, block=Block):
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Parameter(torch.randn(CONTEXT, width) / 10)
        self.blocks = nn.Sequential(*(block(width, heads) for _ in range(blocks)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, CHARACTERS)

    def forward(self, x):
        return self.head(self.last(self.blocks(self.characters(x) + self.places)))


def own_places():
    return Transformer(block=OwnPlaceBlock)


def per_character(outputs, labels):
    return cross_entropy(outputs.flatten(0, -2), labels.flatten())


def images(folder):
    if folder is None:
        raise SystemExit("--data: this task needs a folder with MNIST's four IDX files")
    x, y, test_x, test_y = mnist(folder)
    return (x - MEAN) / DEVIATION, y, (test_x - MEAN) / DEVIATION, test_y


def text(folder):
    """Windows of Python's own manual, and the same one character later."""
    del folder
    return manual(CONTEXT, CHARACTERS)


@dataclass(frozen=True)
class Task:
    """Epochs and batch are defaults; ``rates`` are SGD's, ``momentum_rates`` those with a momentum of 0.9."""

    build: Callable[[], nn.Module]
    data: Callable
    loss: Callable
    epochs: int
    batch: int
    rates: tuple[float, ...]
    momentum_rates: tuple[float, ...]


TASKS = {
    "logistic": Task(logistic, images, cross_entropy, 20, 2048, (0.03, 0.1, 0.3, 1.0), (0.003, 0.01, 0.03, 0.1)),
    "mlp": Task(mlp, images, cross_entropy, 20, 2048, (0.1, 0.3, 0.5, 1.0), (0.03, 0.1, 0.3)),
    "cnn": Task(cnn, images, cross_entropy, 5, 512, (0.03, 0.1, 0.2, 0.5), (0.01, 0.03, 0.1)),
    "text": Task(Transformer, text, per_character, 20, 64, (0.1, 0.3, 1.0, 2.0), (0.03, 0.1, 0.3)),
    "text-own-places": Task(own_places, text, per_character, 12, 64, (), (0.1,)),
}

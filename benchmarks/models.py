"""The models: plain torch, each a Sequential, so that every contender can take it and checkpoints can cut it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
VOCABULARY, LENGTH = 512, 64


@dataclass(frozen=True)
class Model:
    """A model whose output is a matrix of logits, for ``cross_entropy`` with one label for each row.

    Attributes:
        kind: the function of workers/jax_models.py that computes the same from the same parameters.
        build: makes the module, with weights from torch's default generator.
        batch: makes an input and its labels for a number of samples.
        options: what ``kind`` needs besides the parameters.
        kinked: whether it chooses by comparing (ReLU, max-pooling), so that rounding can turn a choice.
    """

    name: str
    kind: str
    build: Callable[[], nn.Sequential]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)
    kinked: bool = False


class LayerNorm(nn.Module):
    """Over the last axis, in elementary operators: torch.func is wrong at second order for the fused one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight + self.bias


class BatchNorm(nn.Module):
    """By the batch's own statistics, in elementary operators for the same reason; no running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        scale = (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]


class Embedding(nn.Module):
    """Of tokens and of positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(VOCABULARY, width))
        self.position = nn.Parameter(0.01 * torch.randn(LENGTH, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.token) + self.position


class Block(nn.Module):
    """GPT-2's: causal attention and an MLP, each with a norm before and a residual connection."""

    mask: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e9).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads[0], heads[1], heads[2]  # make_fx of jvp of jvp fails at unbind
        weights = (q @ k.mT / math.sqrt(width // self.heads) + self.mask).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class SelfAttention(nn.Module):
    """Causal, by PyTorch's own operator, and logits for each place."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.head = heads, nn.Linear(width, 3 * width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(y.transpose(1, 2).reshape(batch * length, width))


class Logits(nn.Module):
    """The head of the transformer; one row for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.head = LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).flatten(0, 1)


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = BatchNorm(outputs), BatchNorm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class Mean(nn.Module):
    """Global average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def logistic() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, CLASSES))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, CLASSES)),
    )


def mlp(inputs: int, width: int, depth: int, outputs: int = CLASSES) -> nn.Sequential:
    """``depth`` linear layers with tanh between them."""
    sizes = [inputs, *[width] * (depth - 1)]
    layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def gpt(width: int, heads: int, depth: int) -> nn.Sequential:
    return nn.Sequential(Embedding(width), *(Block(width, heads) for _ in range(depth)), Logits(width))


def resnet18(width: int) -> nn.Sequential:
    """With the stem for images of 32 x 32 pixels."""
    stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
    blocks = [block for a, b, stride in stages for block in (Residual(a, b, stride), Residual(b, b, 1))]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), BatchNorm(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, Mean(), nn.Linear(8 * width, CLASSES))


def vectors(size: int, samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, size), torch.randint(0, CLASSES, (samples,))


def images(channels: int, side: int, samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, channels, side, side), torch.randint(0, CLASSES, (samples,))


def tokens(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, VOCABULARY, (samples, LENGTH)), torch.randint(0, VOCABULARY, (samples * LENGTH,))


def sequence(length: int, width: int, samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, length, width), torch.randint(0, CLASSES, (samples * length,))


def attention(length: int) -> Model:
    """One layer, so that nothing hides what grows with the length."""
    return Model(
        f"attention-{length}", "attention", lambda: nn.Sequential(SelfAttention(64, 4)), partial(sequence, length, 64)
    )


def _gpt(name: str, width: int, heads: int, depth: int) -> Model:
    return Model(name, "gpt", partial(gpt, width, heads, depth), tokens, {"heads": heads, "depth": depth})


def deep(depth: int) -> Model:
    """Narrow, so that what grows with depth is not hidden behind one layer."""
    return Model(f"deep-{depth}", "mlp", partial(mlp, 64, 64, depth), partial(vectors, 64))


MODELS = {
    model.name: model
    for model in (
        Model("tiny", "mlp", partial(mlp, 8, 16, 3), partial(vectors, 8)),
        Model("logistic", "mlp", logistic, partial(vectors, 784)),
        Model("cnn", "cnn", cnn, partial(images, 1, 28), kinked=True),
        Model("mlp", "mlp", partial(mlp, 784, 1024, 4), partial(vectors, 784)),
        *map(deep, (4, 16, 64)),
        _gpt("gpt-2", 64, 4, 2),
        _gpt("gpt-12", 64, 4, 12),
        _gpt("gpt-2-wide", 768, 12, 2),
        _gpt("gpt-12-wide", 768, 12, 12),
        Model("resnet18", "resnet18", partial(resnet18, 16), partial(images, 3, 32), kinked=True),
        Model("resnet18-wide", "resnet18", partial(resnet18, 64), partial(images, 3, 32), kinked=True),
    )
}

"""The models of benchmarks/models.py in JAX, from the same parameters by their names."""

import math

import jax
import jax.numpy as jnp
from jax import lax, nn


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layers(p):
    """The numbers of the layers that have parameters."""
    return sorted({int(name.split(".")[0]) for name in p})


def mlp(p, x, **options):
    *hidden, last = layers(p)
    for at in hidden:
        x = jnp.tanh(linear(p, at, x))
    return linear(p, last, x)


def convolution(p, name, x, stride=1, padding=0):
    y = lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), [(padding, padding)] * 2)
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def cnn(p, x, **options):
    first, second, third, last = layers(p)
    for at in (first, second):
        x = nn.relu(convolution(p, at, x))
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    return linear(p, last, nn.relu(linear(p, third, x.reshape(len(x), -1))))


def layer_norm(p, name, x):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(p, name, x, heads):
    n, length, width = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).reshape(n, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    mask = jnp.triu(jnp.full((length, length), -1e9, x.dtype), 1)
    weights = nn.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(width // heads) + mask, -1)
    return linear(p, f"{name}.out", (weights @ v).transpose(0, 2, 1, 3).reshape(n, length, width))


def gpt(p, x, heads, depth):
    x = p["0.token"][x] + p["0.position"]
    for at in range(1, depth + 1):
        x = x + attention(p, at, layer_norm(p, f"{at}.norm1", x), heads)
        x = x + linear(p, f"{at}.down", nn.gelu(linear(p, f"{at}.up", layer_norm(p, f"{at}.norm2", x))))
    x = linear(p, f"{depth + 1}.head", layer_norm(p, f"{depth + 1}.norm", x))
    return x.reshape(-1, x.shape[-1])


def batch_norm(p, name, x):
    centred = x - x.mean((0, 2, 3), keepdims=True)
    scaled = centred * lax.rsqrt(jnp.square(centred).mean((0, 2, 3), keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]


def resnet18(p, x, **options):
    stem, norm, *blocks, last = layers(p)
    x = nn.relu(batch_norm(p, norm, convolution(p, stem, x, padding=1)))
    for at in blocks:
        shortcut = f"{at}.shortcut"
        stride = 2 if f"{shortcut}.weight" in p else 1
        y = nn.relu(batch_norm(p, f"{at}.norm1", convolution(p, f"{at}.conv1", x, stride, 1)))
        y = batch_norm(p, f"{at}.norm2", convolution(p, f"{at}.conv2", y, 1, 1))
        x = nn.relu(y + (convolution(p, shortcut, x, stride) if stride == 2 else x))
    return linear(p, last, x.mean((2, 3)))


MODELS = {f.__name__: f for f in (mlp, cnn, gpt, resnet18)}


def cross_entropy(logits, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), y[:, None], 1).mean()

"""What the examples train on: handwritten digits, and text."""

import gzip
from collections import Counter
from pathlib import Path

import torch


def digits():
    """1,797 images of 8 x 8 pixels, a fifth of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, labels = torch.tensor(data.images).float() / 16, torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def mnist(folder):
    """60,000 and 10,000 images of 28 x 28 pixels."""
    parts = {}
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = next((p for end in ("ubyte", "ubyte.gz") if (p := Path(folder, f"{name}-{end}")).exists()), None)
        if path is None:
            raise SystemExit(f"--data: there is no {name}-ubyte(.gz) in {folder}")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
        parts[name] = torch.frombuffer(bytearray(data[4 + 4 * data[3] :]), dtype=torch.uint8).reshape(shape)
    images, labels, test_images, test_labels = parts.values()
    return images.float() / 255, labels.long(), test_images.float() / 255, test_labels.long()


def manual(context, characters):
    """Windows of the texts that Python's help() shows, each beside itself one character later; the last tenth tests.

    The text depends on Python's version. All but its most frequent characters share one number.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    counts = Counter(text)
    kept = sorted(counts, key=lambda c: (-counts[c], c))[: characters - 1]
    numbers = {c: i for i, c in enumerate(kept)}
    codes = torch.tensor([numbers.get(c, len(kept)) for c in text])
    windows = (len(codes) - 1) // context
    x = codes[: windows * context].reshape(windows, context)
    y = codes[1 : windows * context + 1].reshape(windows, context)
    train = windows * 9 // 10
    return x[:train], y[:train], x[train:], y[train:]

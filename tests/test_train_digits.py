"""The main job: on scikit-learn's digits, and on IDX files of its own making."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "train_digits.py"


def run(*options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True)


def idx(values: torch.Tensor) -> bytes:
    """The IDX format: 0, 0, type, dimensions, each size in four bytes, then the values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


@pytest.mark.slow
def test_digits(tmp_path):
    done = run("--eager", "--epochs", 150, "--out", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    label, accuracy = done.stdout.splitlines()[-1].split(": ")
    assert label == "test accuracy"
    assert float(accuracy) > 0.85
    assert "linear_1_tangent" in done.stdout and "directions K" in done.stdout
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("train", (64, 6, 5)), ("t10k", (16, 6, 5))):
        images = torch.randint(0, 256, shape, generator=generator)
        labels = torch.randint(0, 10, shape[:1], generator=generator)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(values)
            path = tmp_path / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    done = run("--eager", "--data", tmp_path, "--epochs", 2, "--out", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    assert "\ntest accuracy: " in done.stdout


def test_a_missing_file_is_named(tmp_path):
    done = run("--data", tmp_path)
    assert done.returncode == 1
    assert "--data: there is no train-images-idx3-ubyte(.gz)" in done.stderr

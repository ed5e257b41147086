"""Pooling of regions and deformable convolution: operators of torchvision's form, and its own where it is installed."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.rules.other_libraries import register_present
from fomoh_fx.rules.regions import RULES, deform_conv2d
from fomoh_fx.rules.registry import register
from tests.oracle import relative_error
from tests.rules.checking import Sample, check


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


REGIONS = torch.tensor(
    [[1, 0, 1, 5, 6], [0, 2, 2, 6, 4], [1, 1, 0, 3, 3], [0, 0, 0, 6, 7]], dtype=torch.float64
)  # image, x0, y0, x1, y1

library = torch.library.Library("fomoh_fx_test_regions", "DEF")
library.define("mean(Tensor x, Tensor regions, int size) -> Tensor")
library.define("mean_by_position(Tensor x, Tensor regions, int size) -> (Tensor, Tensor)")
library.define("maximum(Tensor x, Tensor regions, int size) -> (Tensor, Tensor)")


def cut(x: Tensor, region: Tensor) -> Tensor:
    image, x0, y0, x1, y1 = map(int, region)
    return x[image, :, y0 : y1 + 1, x0 : x1 + 1]


def mean(x: Tensor, regions: Tensor, size: int) -> Tensor:
    return torch.stack([F.adaptive_avg_pool2d(cut(x, region), size) for region in regions])


def mean_by_position(x: Tensor, regions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The part (i, j) of a region comes from the channel number (c * size + i) * size + j."""
    every = mean(x, regions, size).unflatten(1, (-1, size, size))
    i, j = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return every[:, :, i, j, i, j], torch.zeros(0, dtype=torch.int32)


def maximum(x: Tensor, regions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """An index counts through an image; the last region is empty, which gives zero and the index -1."""
    values, indices = [], []
    for region in regions[:-1]:
        value, index = F.adaptive_max_pool2d(cut(x, region), size, return_indices=True)
        wide = int(region[3] - region[1]) + 1
        row, column = index // wide + int(region[2]), index % wide + int(region[1])
        values.append(value)
        indices.append(row * x.shape[3] + column)
    values.append(torch.zeros_like(values[0]))
    indices.append(torch.full_like(indices[0], -1))
    return torch.stack(values), torch.stack(indices).to(torch.int32)


for name, function in {"mean": mean, "mean_by_position": mean_by_position, "maximum": maximum}.items():
    library.impl(name, function, "CompositeImplicitAutograd")
mine = torch.ops.fomoh_fx_test_regions
register(mine.mean.default, *RULES["torchvision::roi_align"])
register(mine.mean_by_position.default, *RULES["torchvision::ps_roi_align"])
register(mine.maximum.default, *RULES["torchvision::roi_pool"])

SAMPLES = {
    mine.mean.default: [Sample((r(2, 3, 8, 8), REGIONS, 2), active=[0])],
    mine.mean_by_position.default: [Sample((r(2, 8, 8, 8), REGIONS, 2), active=[0])],
    mine.maximum.default: [Sample((r(2, 3, 8, 8), REGIONS, 2), active=[0])],
}


def taps(*, groups: int = 1, offset_groups: int = 1, mask: bool = True, bias: bool = True) -> tuple:
    """A convolution of 5 x 6 images to 3 x 3 by a kernel of 2 x 3, stride (1, 2), padding (0, 1), dilation (2, 1)."""
    number = 2 * 3 * offset_groups
    offset = r(2, 2 * number, 3, 3)
    return (
        r(2, 4, 5, 6), r(6, 4 // groups, 2, 3), offset, r(2, number, 3, 3) if mask else r(2, 1), r(6) * bias,
        1, 2, 0, 1, 2, 1, groups, offset_groups, mask,
    )  # fmt: skip


DEFORMED = {
    "masked": taps(),
    "groups": taps(groups=2, mask=False),
    "groups of offsets": taps(offset_groups=2, bias=False),
}

if importlib.util.find_spec("torchvision") is not None:
    import torchvision  # noqa: F401

    register_present()
    theirs = torch.ops.torchvision
    pooled = (REGIONS * 1.1, 0.9, 2, 2)
    SAMPLES |= {
        theirs.roi_align.default: [
            Sample((r(2, 3, 8, 8), *pooled, 2, True), active=[0], truth="difference"),
            Sample((r(2, 3, 8, 8), *pooled, 0, False), active=[0], truth="difference", name="adaptive"),
        ],
        theirs.ps_roi_align.default: [Sample((r(2, 8, 8, 8), *pooled, 2), active=[0], truth="difference")],
        theirs.ps_roi_pool.default: [Sample((r(2, 8, 8, 8), *pooled), active=[0], truth="difference")],
        theirs.roi_pool.default: [Sample((r(2, 3, 8, 8), *pooled), active=[0], truth="difference")],
        theirs.deform_conv2d.default: [
            Sample(args, truth="difference", active=range(5 if args[-1] else 3), name=name)
            for name, args in DEFORMED.items()
        ],
    }

CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def test_regions_have_no_derivative():
    """As in reverse mode."""
    rule, _ = RULES["torchvision::roi_align"]
    moved = HyperDual(REGIONS, torch.ones(1, *REGIONS.shape, dtype=torch.float64))
    assert not rule(mine.mean.default, Components(1, "plane"), r(2, 3, 8, 8), moved, 2).active


def at(image: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The [C, H, W] image between its pixels, zero outside."""
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for i in (int(row.floor()), int(row.floor()) + 1):
        for j in (int(column.floor()), int(column.floor()) + 1):
            if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
                total = total + image[:, i, j] * (1 - (row - i).abs()) * (1 - (column - j).abs())
    return total


def by_definition(
    x, weight, offset, mask, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups,
    use_mask,
):  # fmt: skip
    """One output after the other."""
    n, channels, *_ = x.shape
    outputs, _, kh, kw = weight.shape
    y = torch.zeros(n, outputs, *offset.shape[2:], dtype=x.dtype) + bias[:, None, None]
    displacement = offset.unflatten(1, (offset_groups, kh, kw, 2))
    factor = mask.unflatten(1, (offset_groups, kh, kw)) if use_mask else None
    for b, c, i, j in ((b, c, i, j) for b in range(n) for c in range(channels) for i in range(kh) for j in range(kw)):
        g, og = c // (channels // groups), c // (channels // offset_groups)
        for p in range(y.shape[2]):
            for q in range(y.shape[3]):
                row = p * stride_h - pad_h + i * dilation_h + displacement[b, og, i, j, 0, p, q]
                column = q * stride_w - pad_w + j * dilation_w + displacement[b, og, i, j, 1, p, q]
                value = at(x[b, c : c + 1], row, column) * (1 if factor is None else factor[b, og, i, j, p, q])
                own = slice(g * outputs // groups, (g + 1) * outputs // groups)
                y[b, own, p, q] += weight[own, c % (channels // groups), i, j] * value
    return y


@pytest.mark.parametrize("name", DEFORMED)
def test_deformable_convolution(name):
    args = DEFORMED[name]
    assert relative_error(deform_conv2d(*args), by_definition(*args)) < 1e-12


def test_deformable_convolution_without_displacement():
    """A convolution, also where its taps lie outside of the image; its derivatives are those of its operators."""
    x, weight, bias = r(2, 4, 5, 6), r(6, 2, 3, 3), r(6)
    still = torch.zeros(2, 18, 5, 6, dtype=torch.float64)

    def deformed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return deform_conv2d(x, weight, still, r(2, 1), bias, 1, 1, 1, 1, 1, 1, 2, 1, False)

    assert relative_error(deformed(x, weight, bias), F.conv2d(x, weight, bias, padding=1, groups=2)) < 1e-12
    check(deformed, Sample((x, weight, bias)))

"""Linear rules: moves, sums, joins, padding, pooling and interpolation."""

import operator

import pytest
import torch
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.hyperdual import Components, HyperDual
from fomoh_fx.passes.retrace import retrace
from fomoh_fx.rules.registry import RULES
from tests.oracle import relative_error, reverse_over_reverse
from tests.rules.checking import Sample, check

aten = torch.ops.aten


GENERATOR = torch.Generator().manual_seed(0)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR)


MASK = torch.tensor([[True, False, True], [False, False, True]])
HOLES = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, -1.0, 3.0]], dtype=torch.float64)

MOVES = {
    aten.view.default: [Sample((r(2, 6), [3, -1])), Sample((r(1), []))],
    aten._unsafe_view.default: [Sample((r(2, 6), [3, 4]))],
    aten.reshape.default: [Sample((r(6, 2).t(), [3, 4]), name="not contiguous")],
    aten._reshape_alias.default: [Sample((r(2, 6), [3, 4], [4, 1]))],
    aten.permute.default: [Sample((r(2, 3, 2), [2, 0, -2]))],
    aten.transpose.int: [Sample((r(2, 3), 0, -1))],
    aten.t.default: [Sample((r(2, 3),)), Sample((r(3),))],
    aten.unsqueeze.default: [Sample((r(2, 3), 1)), Sample((r(), 0))],
    aten.squeeze.default: [Sample((r(2, 1, 3),)), Sample((r(1, 1),))],
    aten.squeeze.dim: [Sample((r(2, 1, 3), 1)), Sample((r(2, 3), 1))],
    aten.squeeze.dims: [Sample((r(2, 1, 3, 1), [1, -1]))],
    aten.expand.default: [Sample((r(1, 3), [2, 4, 3])), Sample((r(2, 1), [-1, 3])), Sample((r(), [2]))],
    aten.slice.Tensor: [Sample((r(2, 6), 1, 1, 6, 2)), Sample((r(2, 6), -1, -3))],
    aten.select.int: [Sample((r(2, 3), 1, -1)), Sample((r(3), 0, 1))],
    aten.diagonal.default: [Sample((r(2, 3, 3), 1, 1, 2)), Sample((r(3, 3),))],
    aten.unfold.default: [Sample((r(2, 5), 1, 3, 1))],
    aten.as_strided.default: [
        Sample((r(3, 4), [2, 3], [1, 4], 1)),
        Sample((r(4, 3).t(), [2, 2], [1, 1]), name="transposed"),
        Sample((r(2, 3, 2).permute(2, 0, 1), [2, 2, 2], [1, 6, 2]), name="permuted"),
    ],
    aten.split.Tensor: [Sample((r(2, 5), 2, 1))],
    aten.split_with_sizes.default: [Sample((r(2, 5), [1, 4], -1))],
    aten.unsafe_split.Tensor: [Sample((r(5, 2), 2))],
    aten.unsafe_split_with_sizes.default: [Sample((r(5, 2), [1, 4]))],
    aten.unbind.int: [Sample((r(2, 3), 1))],
    aten.flip.default: [Sample((r(2, 3), [0, -1]))],
    aten.roll.default: [Sample((r(2, 3), [1], [1])), Sample((r(2, 3), [2]), name="flat")],
    aten.rot90.default: [Sample((r(2, 3), 1, [0, 1]))],
    aten.tril.default: [Sample((r(2, 3, 3), -1))],
    aten.triu.default: [Sample((r(3, 3),))],
    aten.diag_embed.default: [Sample((r(2, 3), 1)), Sample((r(3),))],
    aten.trace.default: [Sample((r(3, 4),))],
    aten.repeat.default: [Sample((r(2, 3), [2, 1, 2])), Sample((r(), [2]))],
    aten.clone.default: [Sample((r(1, 2, 2, 3),), {"memory_format": torch.channels_last})],
    aten.alias.default: [Sample((r(2),))],
    aten.lift_fresh.default: [Sample((r(2),))],
    aten.lift_fresh_copy.default: [Sample((r(2),))],
    aten._to_copy.default: [
        Sample((r(2, 3).float(),), {"dtype": torch.float64}, tolerance=1e-6),
        Sample((r(1, 2, 2, 3),), {"memory_format": torch.channels_last}),
        Sample((r(2),), {"dtype": torch.complex128}, name="to complex"),
    ],
}

#: Reverse mode has no derivative of it: :func:`test_a_conversion_inside_what_pytorch_decomposes`.
TESTED_OTHERWISE = [torch.ops.prims.convert_element_type.default]

SUMS = {
    aten.sum.default: [Sample((r(2, 3),)), Sample((r(),))],
    aten.sum.dim_IntList: [Sample((r(2, 3, 2), [0, -1])), Sample((r(2, 3), [1], True)), Sample((r(2, 3), None))],
    aten.mean.default: [Sample((r(2, 3),))],
    aten.mean.dim: [Sample((r(2, 3, 2), [0, -1])), Sample((r(2, 3), [1], True)), Sample((r(2, 3), None))],
    aten.cumsum.default: [Sample((r(2, 3), 1)), Sample((r(2, 3), -2))],
    aten.nansum.default: [Sample((HOLES, [1])), Sample((HOLES,)), Sample((r(),))],
}

JOINS = {
    aten.cat.default: [
        Sample(([r(2, 1), r(2, 3)], 1)),
        Sample(([r(1, 2), r(3, 2), r(2, 2)],), active=[1], name="the middle"),
        Sample(([r(2, 1), r(2, 3), r(2, 1), r(2, 2), r(2, 1)], -1), active=[1, 3], name="gaps everywhere"),
        Sample(([r(0), r(2, 3), r(2, 1)], 1), active=[1], name="empty vector"),
        Sample(([r(2), r(2).float()],), active=[0, 1], name="two dtypes", tolerance=1e-6),
    ],
    aten.stack.default: [
        Sample(([r(2), r(2)], -1)),
        Sample(([r(2), r(2), r(2)], 1), active=[0, 2]),
        Sample(([r(), r()],), active=[1]),
    ],
    aten.where.self: [
        Sample((MASK, r(2, 3), r(2, 3))),
        Sample((MASK, r(2, 3), r(3)), active=[1]),
        Sample((MASK, r(2, 1), r(2, 3)), active=[0]),
        Sample((MASK, r(), r(3)), name="broadcast"),
    ],
    aten.where.ScalarOther: [Sample((MASK, r(3), 2.0))],
    aten.where.ScalarSelf: [Sample((MASK, 2.0, r(2, 1)))],
    aten.masked_fill.Scalar: [Sample((r(2, 3), MASK, 3.0)), Sample((r(3), MASK, 3.0), name="broadcast")],
    aten.masked_fill.Tensor: [Sample((r(2, 3), MASK, r())), Sample((r(2, 3), MASK, r()), active=[1])],
    aten.lerp.Scalar: [Sample((r(2), r(2), 0.7))] + [Sample((r(2, 3), r(3), 0.2), active=[n]) for n in (0, 1)],
    aten.lerp.Tensor: [
        Sample((r(2, 3), r(3), r(2, 1))),
        *[Sample((r(2, 3), r(3), r(2, 1)), active=active) for active in ([0], [1], [2], [0, 2], [1, 2], [0, 1])],
    ],
    aten.copy.default: [Sample((r(2, 3), r(3)), active=active, truth="difference") for active in ([0, 1], [0], [1])],
    aten.fill.Tensor: [Sample((r(2, 3), r())), *[Sample((r(2), r()), active=[n]) for n in (0, 1)]],
}

PADS = {
    aten.constant_pad_nd.default: [Sample((r(2, 3), [1, 2, 0, 1], 5.0)), Sample((r(2, 3), [-1, 1]))],
    aten.reflection_pad1d.default: [Sample((r(2, 1, 4), [1, 2])), Sample((r(2, 4), [1, 0]))],
    aten.reflection_pad2d.default: [Sample((r(2, 1, 3, 3), [1, 2, 0, 1])), Sample((r(1, 3, 3), [1, 1, 1, 1]))],
    aten.reflection_pad3d.default: [
        Sample((r(1, 1, 2, 2, 2), [1, 0, 0, 1, 0, 0])),
        Sample((r(1, 2, 2, 2), [1, 0, 0, 1, 0, 0])),
    ],
    aten.replication_pad1d.default: [Sample((r(2, 1, 4), [1, 2])), Sample((r(2, 4), [1, 0]))],
    aten.replication_pad2d.default: [Sample((r(2, 1, 2, 3), [1, 2, 0, 1])), Sample((r(1, 3, 3), [1, 1, 1, 1]))],
    aten.replication_pad3d.default: [
        Sample((r(1, 1, 2, 2, 2), [1, 0, 0, 1, 0, 0])),
        Sample((r(1, 2, 2, 2), [1, 0, 0, 1, 0, 0])),
    ],
    aten.pixel_shuffle.default: [Sample((r(2, 4, 2, 1), 2)), Sample((r(4, 1, 2), 2))],
    aten.pixel_unshuffle.default: [Sample((r(2, 1, 2, 4), 2)), Sample((r(1, 2, 2), 2))],
    aten.channel_shuffle.default: [Sample((r(2, 4, 1, 2), 2))],
    aten.im2col.default: [Sample((r(2, 1, 3, 3), [2, 2], [1, 1], [0, 0], [1, 1])),
                          Sample((r(1, 3, 3), [2, 2], [1, 1], [1, 1], [2, 2]))],
    aten.col2im.default: [Sample((r(2, 4, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1])),
                          Sample((r(4, 4), [3, 3], [2, 2], [1, 1], [0, 0], [1, 1]))],
}  # fmt: skip

POOLS = {
    aten.avg_pool1d.default: [Sample((r(2, 1, 5), [2])), Sample((r(2, 4), [3], [1], [1]))],
    aten.avg_pool2d.default: [Sample((r(2, 1, 4, 4), [2, 2], [1, 2], [1, 1], False, False)), Sample((r(1, 4, 4), [2]))],
    aten.avg_pool3d.default: [Sample((r(1, 1, 2, 2, 4), [2, 1, 2])), Sample((r(1, 2, 2, 4), [2, 2, 2]))],
    aten._adaptive_avg_pool2d.default: [Sample((r(2, 1, 4, 3), [2, 2])), Sample((r(1, 4, 3), [2, 2]))],
    aten._adaptive_avg_pool3d.default: [Sample((r(2, 1, 2, 2, 3), [1, 2, 2])), Sample((r(1, 2, 2, 3), [2, 1, 2]))],
}


def _upsamples() -> dict:
    inputs = {1: r(2, 1, 3), 2: r(2, 1, 2, 3), 3: r(1, 1, 2, 2, 2)}
    smooth = {1: ("upsample_linear1d",), 3: ("upsample_trilinear3d",)}
    smooth[2] = ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
    samples = {}
    for d, x in inputs.items():
        size, scales = [4] * d, [1.5] * d
        for name in (f"upsample_nearest{d}d", f"_upsample_nearest_exact{d}d"):
            samples[getattr(aten, name).default] = [Sample((x, size))]
            samples[getattr(aten, name).vec] = [Sample((x, None, scales))]
        for name in smooth[d]:
            samples[getattr(aten, name).default] = [Sample((x, size, True)), Sample((x, size, False))]
            samples[getattr(aten, name).vec] = [Sample((x, size, False, None)), Sample((x, None, False, scales))]
    return samples


def _grids() -> dict:
    """Points inside, outside and far outside, none of them on a pixel's edge."""
    flat, deep = r(1, 2, 3, 3), r(1, 1, 2, 2, 3)
    points = torch.tensor([[0.13, -0.71], [1.3, 0.2], [-1.24, 1.12], [0.77, -2.7]], dtype=torch.float64)
    grid2, grid3 = points.reshape(1, 2, 2, 2), torch.cat([points, points[:, :1] * 0.6], 1).reshape(1, 2, 2, 1, 3)
    options = [(0, 0, False), (0, 1, True), (0, 2, False), (0, 2, True), (1, 0, True)]
    two = [Sample((flat, grid2, *o), truth="difference") for o in options]
    two += [Sample((flat, grid2, 2, 0, True), truth="difference", name="bicubic")]
    two += [Sample((flat, grid2, 0, 0, False), active=[n], truth="difference") for n in (0, 1)]
    border = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    three = [Sample((deep, grid3, *o), truth="difference") for o in options[::2]]
    return {
        aten.grid_sampler_2d.default: two + [Sample((flat, border, 0, 1, True), active=[0], name="border")],
        aten.grid_sampler_3d.default: three,
    }


SAMPLES = MOVES | SUMS | JOINS | PADS | POOLS | _upsamples() | _grids()
CASES = [(op, sample) for op, samples in SAMPLES.items() for sample in samples]


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize(("op", "sample"), CASES, ids=[f"{op}-{s.name or i}" for i, (op, s) in enumerate(CASES)])
def test_rule(op, sample, second_order):
    check(op, sample, second_order)


def test_what_is_not_taken_does_not_leak():
    """-inf masks and NaN: neither the value nor the component of the branch not taken is seen."""
    mask = torch.tensor([True, False])
    components = Components(1, "plane")
    infinite = torch.tensor([-torch.inf, torch.nan], dtype=torch.float64)
    x = HyperDual(r(2), infinite.flip(0)[None] * torch.tensor([torch.nan, 1.0]), None)
    for op, args in {
        aten.masked_fill.Scalar: (x, mask, -torch.inf),
        aten.where.ScalarSelf: (mask, -torch.inf, x),
        aten.where.ScalarOther: (~mask, x, -torch.inf),
        aten.where.self: (mask, infinite, x),
    }.items():
        out = RULES[op](op, components, *args)
        assert torch.equal(out.tangent, torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)), op


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_components_keep_the_dtype(dtype):
    for op in (aten.mean.dim, aten.cat.default, aten.lerp.Scalar, aten.masked_fill.Scalar, aten.avg_pool2d.default):
        sample = SAMPLES[op][0]
        args = pytree.tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, sample.args)
        dual = pytree.tree_map_only(
            torch.Tensor, lambda t: HyperDual(t, t[None], t[None]) if t.dtype == dtype else t, args
        )
        out = RULES[op](op, Components(1, "plane"), *dual)
        assert (out.primal.dtype, out.tangent.dtype, out.cross.dtype) == (dtype,) * 3, op


VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dims,
    aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.diagonal.default,
}  # fmt: skip

#: Operators that need a mask, positions, or more: their rules are not one node.
WITH_FACTORS = {aten.as_strided.default, aten.nansum.default, aten.lerp.Tensor}


def _is_float(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _tensors(sample):
    return [t for t in pytree.tree_leaves((sample.args, sample.kwargs)) if _is_float(t)]


@pytest.mark.parametrize("op", [*MOVES, *SUMS, *JOINS, *PADS, *POOLS, *_upsamples()], ids=str)
def test_one_node_for_each_component(op):
    """Besides views: the operator on the primal once, and once on each order's stack, for any K."""
    if op not in RULES or op in WITH_FACTORS:
        return
    sample = next((s for s in SAMPLES[op] if all(t.is_contiguous() for t in _tensors(s))), None)
    if sample is None:
        return
    for directions in (1, 3):
        leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        stacks = [t.expand(directions, *t.shape).contiguous() for t in _tensors(sample)]

        def expansion(*inputs, leaves=leaves, spec=spec, tensors=tensors, directions=directions):
            values, parts = iter(inputs[: len(tensors)]), iter(inputs[len(tensors) :])
            filled = [next(values) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            duals = [HyperDual(t, next(parts)) if _is_float(t) else t for t in filled]
            args, kwargs = pytree.tree_unflatten(duals, spec)
            out = RULES[op](op, Components(directions, "plane"), *args, **kwargs)
            return [h.tangent for h in pytree.tree_leaves(out, is_leaf=lambda h: isinstance(h, HyperDual))]

        graph = retrace(expansion, [*tensors, *stacks]).graph
        graph.eliminate_dead_code()
        targets = [n.target for n in graph.nodes if n.op == "call_function" and n.target not in VIEWS]
        targets = [t for t in targets if t is not operator.getitem]
        assert len(targets) <= 1, targets


def _written(x):
    y = torch.zeros_like(x)
    y[0] = x[-1] ** 2
    y[:, :, 1:3] = x[:, :, :2]
    y[-1] = 3.0
    return y


DYNAMIC = {
    "padding": lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"),
    "interpolation": lambda x: torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "pooling": lambda x: torch.nn.functional.max_pool2d(x, 2) - torch.nn.functional.avg_pool2d(x, 2),
    "joins": lambda x: torch.cat([torch.cat([x.detach(), x]), torch.lerp(x, x * 2, x)]),
    "writes": _written,
    "patches": lambda x: torch.nn.functional.unfold(x, 2),
    "spectrum": lambda x: torch.fft.rfft(x).abs(),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_batch(name):
    """One specialisation serves every batch size: no rule fixes it to its example."""

    def function(x):
        y = DYNAMIC[name](x)
        return (y**2).sum() + y.sin().sum()

    hd = fomoh_fx.transform(function, wrt="inputs")
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    hd.trace(r(3, 1, 4, 4), tangents=(r(2, 3, 1, 4, 4),), dynamic_shapes=batch)
    x, v = r(5, 1, 4, 4), r(2, 5, 1, 4, 4)
    out = hd(x, tangents=(v,))
    y, tangents, crosses = reverse_over_reverse(function, [x], [v])
    assert relative_error(out.tangent, tangents) < 1e-12
    assert relative_error(out.hessian(), crosses) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_conversion_inside_what_pytorch_decomposes(dtype):
    """renorm computes its norms in float32."""
    x, v = (torch.randn(*s, dtype=torch.float64).to(dtype) for s in ((3, 4), (2, 3, 4)))
    out, exact = (
        fomoh_fx.transform(lambda x: torch.renorm(x, 2, 0, 1.0), wrt="inputs")(a, tangents=(b,))
        for a, b in ((x, v), (x.double(), v.double()))
    )
    assert out.cross.dtype == dtype
    for part, reference in ((out.tangent, exact.tangent), (out.cross, exact.cross)):
        torch.testing.assert_close(part.double(), reference, rtol=0.1, atol=0.05)

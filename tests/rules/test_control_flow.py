"""Branches, loops and scans against the same computation in plain Python."""

import operator

import pytest
import torch
from torch._higher_order_ops import associative_scan, scan
from torch._higher_order_ops.map import map as higher_order_map
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils import _pytree as pytree

import fomoh_fx
from fomoh_fx.hyperdual import Components
from fomoh_fx.rules.control_flow import COMPOSITES, RULES
from tests.oracle import relative_error, reverse_over_reverse

higher_order = torch.ops.higher_order
TESTED_OTHERWISE = [*RULES, *COMPOSITES]


def r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def check(function, plain, inputs, active=None, second_order="plane", directions=3, compiled=False):
    """Compare ``function`` transformed with reverse-over-reverse of ``plain``, which computes the same."""
    active = list(range(len(inputs))) if active is None else active
    seeds = tuple(
        torch.randn(directions, *x.shape, dtype=x.dtype) if i in active else None for i, x in enumerate(inputs)
    )
    hd = fomoh_fx.transform(function, wrt="inputs", second_order=second_order)
    hd = fomoh_fx.compile(hd) if compiled else hd
    out = hd(*inputs, tangents=seeds)

    def flat(*xs):
        moved = dict(zip(active, xs, strict=True))
        found = pytree.tree_leaves(plain(*(moved.get(i, x) for i, x in enumerate(inputs))))
        return torch.cat([y.reshape(-1) for y in found if y.is_floating_point()])

    y, tangents, crosses = reverse_over_reverse(flat, [inputs[i] for i in active], [seeds[i] for i in active])
    components = Components(directions, second_order)
    listed = torch.stack([crosses[i, j] for i, j in components.pairs])
    listed = listed.sum(0) if second_order == "trace" else listed
    for part, truth in {"primal": y, "tangent": tangents, "cross": listed}.items():
        values = [v for v in pytree.tree_leaves(getattr(out, part)) if v is not None and v.is_floating_point()]
        lead = truth.shape[:-1]
        actual = torch.cat([v.reshape(*lead, -1) for v in values], -1)
        assert relative_error(actual, truth) < 1e-10, part
    return hd


def branches(x, w):
    return torch.cond(x.sum() > 0, lambda x: (torch.sin(x) @ w, x * 1), lambda x: (x * 2, x.cos()), (x,))


def branches_plain(x, w):
    return (torch.sin(x) @ w, x * 1) if x.sum() > 0 else (x * 2, x.cos())


def loop(x, w):
    return while_loop(lambda i, c: i < 3, lambda i, c: (i + 1, torch.tanh(c @ w)), (torch.tensor(0), x))[1]


def loop_plain(x, w):
    for _ in range(3):
        x = torch.tanh(x @ w)
    return x


def recurrence(x, w):
    def step(carry, row):
        hidden, total = carry
        hidden = functional.layer_norm(torch.tanh(hidden @ w + row), (3,))
        return (hidden, total + hidden.sum()), hidden * row

    return scan(step, (torch.zeros(3, dtype=x.dtype), torch.zeros((), dtype=x.dtype)), x)


def recurrence_plain(x, w):
    hidden, total, rows = torch.zeros(3, dtype=x.dtype), torch.zeros((), dtype=x.dtype), []
    for row in x:
        hidden = functional.layer_norm(torch.tanh(hidden @ w + row), (3,))
        total = total + hidden.sum()
        rows.append(hidden * row)
    return hidden, total, torch.stack(rows)


def nested(x, w):
    def step(carry, row):
        new = torch.cond(row.sum() > 0, lambda c, row: torch.sin(c @ w) + row, lambda c, row: c * row, (carry, row))
        return new, new * 2

    return scan(step, torch.ones(3, dtype=x.dtype), x)


def nested_plain(x, w):
    carry, rows = torch.ones(3, dtype=x.dtype), []
    for row in x:
        carry = torch.sin(carry @ w) + row if row.sum() > 0 else carry * row
        rows.append(carry * 2)
    return carry, torch.stack(rows)


def stopped(x, w):
    return torch.cond(x.sum() > 0, lambda x: x.detach() * x @ w, lambda x: x.cos(), (x,))


def each(x, w):
    return higher_order_map(lambda row, w: torch.tanh(row @ w) * row, x, w)


def products(x, w):
    return associative_scan(operator.mul, x * w[0], dim=0, combine_mode="generic")


CASES = {
    "cond": (branches, branches_plain),
    "cond, other branch": (lambda x, w: branches(-x.abs(), w), lambda x, w: branches_plain(-x.abs(), w)),
    "while_loop": (loop, loop_plain),
    "scan": (recurrence, recurrence_plain),
    "scan, reversed": (
        lambda x, w: scan(lambda c, row: (c * row, c @ w), x[0], x, reverse=True),
        lambda x, w: _reversed(x, w),
    ),
    "cond in scan": (nested, nested_plain),
    "detach in cond": (stopped, lambda x, w: x.detach() * x @ w if x.sum() > 0 else x.cos()),
    "map": (each, lambda x, w: torch.tanh(x @ w) * x),
    "associative_scan": (products, lambda x, w: (x * w[0]).cumprod(0)),
}


def _reversed(x, w):
    carry, rows = x[0], []
    for row in x.flip(0):
        rows.append(carry @ w)
        carry = carry * row
    return carry, torch.stack(rows[::-1])


@pytest.mark.parametrize("second_order", ["plane", "diagonal", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_control_flow(name, second_order):
    check(*CASES[name], (r(5, 3), r(3, 3)), second_order=second_order)


@pytest.mark.parametrize("active", [[0], [1]])
@pytest.mark.parametrize("name", ["cond", "cond, other branch", "while_loop", "scan", "map"])
def test_one_active_input(name, active):
    check(*CASES[name], (r(5, 3), r(3, 3)), active)


@pytest.mark.parametrize("name", ["cond", "while_loop", "scan", "map"])
def test_node_count_does_not_depend_on_directions(name):
    def count(directions):
        hd = check(*CASES[name], (r(5, 3), r(3, 3)), directions=directions)
        modules = list(hd.stages.values())[-1].modules()
        return sum(len(m.graph.nodes) for m in modules if isinstance(m, torch.fx.GraphModule))

    assert count(2) == count(5)


def test_a_loop_keeps_its_body_once():
    def body(x, w):
        return while_loop(lambda i, c: i < 50, lambda i, c: (i + 1, torch.tanh(c @ w)), (torch.tensor(0), x))[1]

    hd = fomoh_fx.transform(body, wrt="inputs")
    hd(r(5, 3), r(3, 3), tangents=(r(2, 5, 3), None))
    final = list(hd.stages.values())[-1]
    assert len(final.graph.find_nodes(op="call_function", target=higher_order.while_loop)) == 1
    assert not any("tanh" in str(n.target) for n in final.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cond", "while_loop", "scan", "map"])
def test_compiled(name):
    check(*CASES[name], (r(5, 3), r(3, 3)), directions=2, compiled=True)


def _halves(x):
    return [part.clone() for part in (x * 2).chunk(2)]


def _scanned(x):
    a, b = _halves(x)
    return scan(lambda c, row: (c * row, c.sin()), a[0].clone(), b)[1]


def _looped(x):
    return while_loop(lambda i, a, b: i < 3, lambda i, a, b: (i + 1, a * b, b.sin()), (torch.tensor(0), *_halves(x)))[1]


def _looped_plain(x):
    a, b = _halves(x)
    for _ in range(3):
        a, b = a * b, b.sin()
    return a


def _scanned_plain(x):
    (c, *_), rows = _halves(x)
    found = []
    for row in rows:
        found.append(c.sin())
        c = c * row
    return torch.stack(found)


HALVES = {
    "cond": (
        lambda x: torch.cond(x.sum() > 100, lambda a, b: a.sin() * b, lambda a, b: a.cos() * b, _halves(x)),
        lambda x: _halves(x)[0].cos() * _halves(x)[1],
    ),
    "map": (
        lambda x: higher_order_map(lambda row, rows: (row * rows).sin(), *_halves(x)),
        lambda x: torch.stack([(row * _halves(x)[1]).sin() for row in _halves(x)[0]]),
    ),
    "scan": (_scanned, _scanned_plain),
    "while_loop": (_looped, _looped_plain),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", HALVES)
def test_operands_are_parts_of_one_tensor(name, compiled):
    """Copied by the model, they and their components share memory again once needless copies are left out."""
    check(*HALVES[name], (r(4, 3),), directions=1, compiled=compiled)


# Flexible attention.


def causal(batch, head, row, column):
    return row >= column


def attention_plain(q, k, v, bias=None, mask=None, group=1):
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if bias is not None:
        scores = scores + bias[:, None, None] * (rows - columns)
    if mask is not None:
        scores = scores.masked_fill(~mask(None, None, rows, columns), -torch.inf)
    return scores.softmax(-1) @ v


def test_flex_attention_with_an_active_score_mod():
    def attention(q, k, v, bias):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h] * (i - j))

    check(attention, attention_plain, (r(2, 2, 4, 3), r(2, 2, 5, 3), r(2, 2, 5, 3), r(2)), directions=2)


def test_flex_attention_with_a_block_mask_and_grouped_heads():
    mask = create_block_mask(causal, None, None, 4, 4, device="cpu")

    def attention(q, k, v):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    def plain(q, k, v):
        return attention_plain(q, k, v, mask=causal, group=2)

    check(attention, plain, (r(1, 4, 4, 3), r(1, 2, 4, 3), r(1, 2, 4, 3)), directions=2)


def test_flex_attention_of_a_row_that_is_fully_masked():
    mask: BlockMask = create_block_mask(lambda b, h, i, j: i > j, None, None, 4, 4, device="cpu")

    def attention(q):
        return flex_attention(q, q, q, block_mask=mask)

    def plain(q):
        rows = attention_plain(q[:, :, 1:], q[:, :, :3], q[:, :, :3], mask=lambda b, h, i, j: i >= j)
        return torch.cat([torch.zeros_like(q[:, :, :1]), rows], 2)

    check(attention, plain, (r(1, 1, 4, 3),), directions=2)


# Operators whose body is run once.


def test_bodies_without_gradient_are_constants():
    body = COMPOSITES[higher_order.wrap_with_set_grad_enabled]
    x = r(3)
    assert torch.equal(body(True, torch.sin, x), x.sin())

    def function(x):
        return body(False, torch.sin, x) * x

    check(function, lambda x: x.sin().detach() * x, (x,))


def test_bodies_that_run_once_are_inlined():
    x = r(3)
    for op in (higher_order.wrap, higher_order.tag_activation_checkpoint):
        assert torch.equal(COMPOSITES[op](torch.sin, x), x.sin())
    assert torch.equal(COMPOSITES[higher_order.invoke_subgraph](torch.sin, "name", x), x.sin())
    single = r(2, 2).float()
    y = COMPOSITES[higher_order.wrap_with_autocast]("cpu", torch.bfloat16, True, None, torch.mm, single, single)
    assert y.dtype == torch.bfloat16


def test_checkpoints_are_inlined():
    def function(x, w):
        return torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(x @ w), x, use_reentrant=False)

    check(function, lambda x, w: torch.tanh(x @ w), (r(2, 3), r(3, 3)))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_associative_scan_composite(length):
    x, y = r(length, 2), r(length, 2) + 1

    def combine(a, b, c, d):  # of the affine maps a + b t
        return c + d * a, b * d

    carry, rows = (x[0], y[0]), [(x[0], y[0])]
    for i in range(1, length):
        carry = combine(*carry, x[i], y[i])
        rows.append(carry)
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    found = COMPOSITES[higher_order.associative_scan](combine, [x, y])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

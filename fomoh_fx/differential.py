"""Differential operators as functions of a function, in the manner of ``torch.func``, by forward passes only.

Each takes a function of tensors and returns a function of the same arguments. Directions are the unit vectors of the
argument number ``argnums`` (any pytree of floating-point tensors), all in one pass: n of them for n numbers, so these
are for arguments of moderate size. ``chunk_size`` bounds how many directions are propagated at a time where the
result does not need all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.transform import HyperDualModule, transform

Function = Callable[..., Any]


class _Argument:
    """One argument as a flat vector of n numbers, and unit directions along it."""

    def __init__(self, args: tuple[Any, ...], at: int, name: str) -> None:
        if not -len(args) <= at < len(args):
            raise ArgumentError(f"argnums: {at} is out of range for {len(args)} arguments")
        self.at = at % len(args)
        self.leaves, self.spec = pytree.tree_flatten(args[self.at])
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise ArgumentError(f"argnums: {name} needs real floating-point tensors in argument {at}, got {leaf!r}")
        self.count = sum(leaf.numel() for leaf in self.leaves)
        self.others = len(args)

    def tangents(self, flat: Tensor) -> tuple[Any, ...]:
        """Rows of a matrix ``[K, n]`` as tangents of the argument, None for the other arguments."""
        parts = flat.split([leaf.numel() for leaf in self.leaves], dim=1)
        stacks = [part.to(leaf.dtype).reshape(-1, *leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]
        tree = pytree.tree_unflatten(stacks, self.spec)
        return tuple(tree if i == self.at else None for i in range(self.others))

    def units(self, chunk_size: int | None) -> Iterator[Tensor]:
        """The identity matrix in chunks of rows."""
        dtype, device = self.leaves[0].dtype, self.leaves[0].device
        return iter(torch.eye(self.count, dtype=dtype, device=device).split(chunk_size or self.count))

    def flatten(self, tree: Any) -> Tensor:
        """A pytree like the argument as a vector ``[n]``."""
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ArgumentError(f"v: must have the structure of argument {self.at}, {self.spec}, got {spec}")
        for leaf, mine in zip(leaves, self.leaves, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != mine.shape:
                raise ArgumentError(f"v: must have the shapes of argument {self.at}, {list(mine.shape)}, got {leaf!r}")
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unflatten(self, stacked: Tensor) -> Any:
        """``[n, *output]`` as a pytree of ``[*output, *leaf]``, the layout of ``torch.func.jacrev``."""
        parts = stacked.split([leaf.numel() for leaf in self.leaves])
        shaped = [
            part.movedim(0, -1).reshape(*stacked.shape[1:], *leaf.shape)
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        return pytree.tree_unflatten(shaped, self.spec)


def _evaluated(hd: HyperDualModule, args: Sequence[Any], tangents: Any, is_whole: bool) -> HyperDual:
    """One pass, over all directions or over some.

    Raises:
        ArgumentError: over some, where each pass would draw other random numbers, or change the function's state again.
    """
    if is_whole:
        return hd(*args, tangents=tangents)
    evaluate = hd.prepare(*args, tangents=tangents)
    program = evaluate.specialization.program
    if program.draws or any(out.changes is not None for out in program.outputs):
        raise ArgumentError(
            "chunk_size: f draws random numbers or changes its state, which every chunk of directions would do anew; "
            "leave it out, so that all directions are in one pass"
        )
    return evaluate()


def _single(out: HyperDual, name: str, scalar: bool = False) -> None:
    if not isinstance(out.primal, Tensor):
        raise ArgumentError(f"f: {name} needs a function that returns one tensor, got {type(out.primal).__name__}")
    if scalar and out.primal.dim() != 0:
        raise ArgumentError(f"f: {name} needs a function that returns a scalar tensor, got {list(out.primal.shape)}")


def _transformed(f: Function, second_order: Any) -> HyperDualModule:
    if not callable(f):
        raise ArgumentError(f"f: expected a function of tensors, got {type(f).__name__}")
    return transform(f, wrt="inputs", second_order=second_order, first_order=second_order is None)


def grad(f: Function, argnums: int = 0, *, chunk_size: int | None = None) -> Function:
    """The gradient of a scalar function: ``grad(f)(*args)`` has the structure and shapes of argument ``argnums``.

    Raises:
        ArgumentError: f returns no scalar tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, None)

    def gradient(*args: Any) -> Any:
        argument = _Argument(args, argnums, "grad")
        parts = []
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, argument.tangents(units), len(units) == argument.count)
            _single(out, "grad", scalar=True)
            parts.append(out.tangent)
        return argument.unflatten(torch.cat(parts))

    return gradient


def hessian(f: Function, argnums: int = 0) -> Function:
    """The Hessian of a function of one tensor ``[*shape]``: ``hessian(f)(*args)`` is ``[*output, *shape, *shape]``.

    All n(n+1)/2 pairs of unit vectors in one forward pass: H_ij = e_i^T H e_j.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not one real floating-point tensor.
    """
    hd = _transformed(f, "plane")

    def matrix(*args: Any) -> Tensor:
        argument = _Argument(args, argnums, "hessian")
        if len(argument.leaves) != 1:
            raise ArgumentError(f"argnums: hessian needs one tensor in argument {argnums}, got {argument.spec}")
        (units,) = argument.units(None)
        out = hd(*args, tangents=argument.tangents(units))
        _single(out, "hessian")
        shape = argument.leaves[0].shape
        return out.hessian().movedim((0, 1), (-2, -1)).reshape(*out.primal.shape, *shape, *shape)

    return matrix


def hvp(f: Function, argnums: int = 0, *, chunk_size: int | None = None) -> Function:
    """Hessian-vector products: ``hvp(f)(*args, v)`` is H v with the structure of argument ``argnums``, f scalar.

    By polarisation of quadratic forms, e_i^T H v = ((e_i + v)^T H (e_i + v) - (e_i - v)^T H (e_i - v)) / 4, one
    ``"diagonal"`` pass over 2n directions. v is scaled to length one first, so that rounding does not grow with it.

    Raises:
        ArgumentError: f returns no scalar tensor, or ``v`` does not fit the argument.
    """
    hd = _transformed(f, "diagonal")

    def product(*args: Any) -> Any:
        *inputs, v = args
        argument = _Argument(tuple(inputs), argnums, "hvp")
        flat = argument.flatten(v)
        largest = flat.abs().amax()  # first, so that no square is out of range
        scaled = torch.where(largest > 0, flat / largest, flat)
        length = scaled.norm()
        unit = torch.where(length > 0, scaled / length, scaled)
        parts = []
        for units in argument.units(chunk_size):
            tangents = argument.tangents(torch.cat([units + unit, units - unit]))
            out = _evaluated(hd, inputs, tangents, len(units) == argument.count)
            _single(out, "hvp", scalar=True)
            plus, minus = out.cross.chunk(2)
            parts.append((plus - minus) / 4 * length * largest)
        return argument.unflatten(torch.cat(parts))

    return product


def quadratic_form(f: Function, argnums: int = 0) -> Function:
    """Curvature along a direction: ``quadratic_form(f)(*args, v)`` is v^T H v, shaped like f's output (a tensor).

    One forward pass with one direction.

    Raises:
        ArgumentError: f returns no single tensor, or ``v`` does not fit the argument.
    """
    hd = _transformed(f, "diagonal")

    def form(*args: Any) -> Tensor:
        *inputs, v = args
        argument = _Argument(tuple(inputs), argnums, "quadratic_form")
        out = hd(*inputs, tangents=argument.tangents(argument.flatten(v).unsqueeze(0)))
        _single(out, "quadratic_form")
        return out.cross[0]

    return form


def hessian_diagonal(f: Function, argnums: int = 0, *, chunk_size: int | None = None) -> Function:
    """The diagonal of the Hessian, e_i^T H e_i: a pytree of ``[*output, *leaf]`` like argument ``argnums``.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, "diagonal")

    def diagonal(*args: Any) -> Any:
        argument = _Argument(args, argnums, "hessian_diagonal")
        parts = []
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, argument.tangents(units), len(units) == argument.count)
            _single(out, "hessian_diagonal")
            parts.append(out.cross)
        return argument.unflatten(torch.cat(parts))

    return diagonal


def laplacian(f: Function, argnums: int = 0, *, chunk_size: int | None = None) -> Function:
    """The Laplacian sum_i e_i^T H e_i, shaped like f's output (one tensor).

    One component for the whole sum (the "forward Laplacian"), so its cost is that of n tangents and one more.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, "trace")

    def trace(*args: Any) -> Tensor:
        argument = _Argument(args, argnums, "laplacian")
        total: Any = 0
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, argument.tangents(units), len(units) == argument.count)
            _single(out, "laplacian")
            total = total + out.cross
        return total

    return trace

"""Differential operators as functions of a function, in the manner of ``torch.func``, by forward passes only.

Each takes a function of tensors and returns a function of the same arguments. Directions are the unit vectors of the
argument number ``argnums`` (any pytree of floating-point tensors; for a tuple of numbers, these arguments as one),
all in one pass: n of them for n numbers, so these are for arguments of moderate size. Keyword arguments go on to
f. ``chunk_size`` bounds how many directions are propagated at a time where the result does not need all pairs.

The results are values: no autograd graph leads from them to the arguments or to a parameter of f, so ``backward`` does
not see them, and ``torch.func.grad`` and the like refuse them (``vmap`` does not). Inside a model or a loss that is
transformed itself they are a part of it, and so is one operator inside another (``laplacian(laplacian(f))``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fomoh_fx.errors import ArgumentError
from fomoh_fx.hyperdual import HyperDual
from fomoh_fx.transform import HyperDualModule, transform

Function = Callable[..., Any]


Argnums = int | tuple[int, ...]


class _Argument:
    """One argument, or several as a tuple, as a flat vector of n numbers, and unit directions along it."""

    def __init__(self, args: tuple[Any, ...], argnums: Argnums, name: str) -> None:
        self.at = _positions(argnums, len(args))
        chosen = tuple(args[i] for i in self.at)
        self.is_tuple, self.others = isinstance(argnums, tuple), len(args)
        self.leaves, self.spec = pytree.tree_flatten(chosen if self.is_tuple else chosen[0])
        for leaf in self.leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise ArgumentError(
                    f"argnums: {name} needs real floating-point tensors in argument {argnums}, got {leaf!r}"
                )
        if not self.leaves:
            raise ArgumentError(f"argnums: {name} needs a tensor in argument {argnums}, got {self.spec}")
        self.count = sum(leaf.numel() for leaf in self.leaves)

    def tangents(self, flat: Tensor) -> tuple[Any, ...]:
        """Rows of a matrix ``[K, n]`` as tangents of the argument, None for the other arguments."""
        parts = flat.split([leaf.numel() for leaf in self.leaves], dim=1)
        stacks = [
            part.to(leaf.dtype).reshape(len(flat), *leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        tree = pytree.tree_unflatten(stacks, self.spec)
        by_position = dict(zip(self.at, tree if self.is_tuple else (tree,), strict=True))
        return tuple(by_position.get(i) for i in range(self.others))

    def units(self, chunk_size: int | None) -> Iterator[Tensor]:
        """The identity matrix in chunks of rows; one row of nothing where there are no numbers."""
        if chunk_size is not None and chunk_size < 1:
            raise ArgumentError(f"chunk_size: must be at least 1, got {chunk_size}")
        dtype, device = self.leaves[0].dtype, self.leaves[0].device
        rows = torch.eye(max(self.count, 1), self.count, dtype=dtype, device=device)
        return iter(rows.split(chunk_size or len(rows)))

    def is_whole(self, units: Tensor) -> bool:
        """Whether these are all directions."""
        return len(units) == max(self.count, 1)

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
        parts = stacked[: self.count].split([leaf.numel() for leaf in self.leaves])
        shaped = [
            part.movedim(0, -1).reshape((*stacked.shape[1:], *leaf.shape))
            for part, leaf in zip(parts, self.leaves, strict=True)
        ]
        return pytree.tree_unflatten(shaped, self.spec)


def _with_vector(args: tuple[Any, ...], argnums: Argnums, name: str) -> tuple[_Argument, tuple[Any, ...], Tensor]:
    """The argument, f's own arguments, and the vector that is given after them, flat."""
    if len(args) < 2:
        raise ArgumentError(f"v: missing; {name}(f) takes f's arguments, and the vector after them")
    *inputs, v = args
    argument = _Argument(tuple(inputs), argnums, name)
    return argument, tuple(inputs), argument.flatten(v)


def _positions(argnums: Argnums, count: int) -> tuple[int, ...]:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or not all(isinstance(n, int) for n in numbers):
        raise ArgumentError(f"argnums: expected the number of an argument, or a tuple of them, got {argnums!r}")
    for n in numbers:
        if not -count <= n < count:
            raise ArgumentError(f"argnums: {n} is out of range for {count} arguments")
    at = tuple(n % count for n in numbers)
    if len(set(at)) < len(at):
        raise ArgumentError(f"argnums: {argnums} has an argument twice")
    return at


def _evaluated(
    hd: HyperDualModule, args: Sequence[Any], kwargs: Mapping[str, Any], tangents: Any, is_whole: bool
) -> HyperDual:
    """One pass, over all directions or over some.

    Raises:
        ArgumentError: over some, where each pass would draw other random numbers, or change the function's state again.
    """
    if is_whole:
        return hd(*args, tangents=tangents, **kwargs)
    evaluate = hd.prepare(*args, tangents=tangents, **kwargs)
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


def grad(f: Function, argnums: Argnums = 0, *, chunk_size: int | None = None) -> Function:
    """The gradient of a scalar function: ``grad(f)(*args)`` has the structure and shapes of argument ``argnums``.

    Raises:
        ArgumentError: f returns no scalar tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, None)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        argument = _Argument(args, argnums, "grad")
        parts = []
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, kwargs, argument.tangents(units), argument.is_whole(units))
            _single(out, "grad", scalar=True)
            parts.append(out.tangent)
        return argument.unflatten(torch.cat(parts))

    return gradient


def hessian(f: Function, argnums: Argnums = 0) -> Function:
    """The Hessian: ``hessian(f)(*args)`` is ``[*output, *shape, *shape]`` for an argument of ``[*shape]``.

    For an argument of several tensors it has the argument's structure twice, as in ``torch.func``: entry ``[i][j]`` is
    ``[*output, *shape_i, *shape_j]``. All n(n+1)/2 pairs of unit vectors in one forward pass: H_ij = e_i^T H e_j.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, "plane")

    def matrix(*args: Any, **kwargs: Any) -> Any:
        argument = _Argument(args, argnums, "hessian")
        (units,) = argument.units(None)
        out = hd(*args, tangents=argument.tangents(units), **kwargs)
        _single(out, "hessian")
        return pytree.tree_map(argument.unflatten, argument.unflatten(out.hessian()))

    return matrix


def hvp(f: Function, argnums: Argnums = 0, *, chunk_size: int | None = None) -> Function:
    """Hessian-vector products: ``hvp(f)(*args, v)`` is H v with the structure of argument ``argnums``, f scalar.

    By polarisation of quadratic forms, e_i^T H v = ((e_i + v)^T H (e_i + v) - (e_i - v)^T H (e_i - v)) / 4, one
    ``"diagonal"`` pass over 2n directions. v is scaled to length one first, so that rounding does not grow with it.

    Raises:
        ArgumentError: f returns no scalar tensor, or ``v`` does not fit the argument.
    """
    hd = _transformed(f, "diagonal")

    def product(*args: Any, **kwargs: Any) -> Any:
        argument, inputs, flat = _with_vector(args, argnums, "hvp")
        largest = flat.abs().amax() if argument.count else flat.sum()  # first, so that no square is out of range
        scaled = torch.where(largest > 0, flat / largest, flat)
        length = scaled.norm()
        unit = torch.where(length > 0, scaled / length, scaled)
        parts = []
        for units in argument.units(chunk_size):
            tangents = argument.tangents(torch.cat([units + unit, units - unit]))
            out = _evaluated(hd, inputs, kwargs, tangents, argument.is_whole(units))
            _single(out, "hvp", scalar=True)
            plus, minus = out.cross.chunk(2)
            parts.append((plus - minus) / 4 * length * largest)
        return argument.unflatten(torch.cat(parts))

    return product


def quadratic_form(f: Function, argnums: Argnums = 0) -> Function:
    """Curvature along a direction: ``quadratic_form(f)(*args, v)`` is v^T H v, shaped like f's output (a tensor).

    One forward pass with one direction.

    Raises:
        ArgumentError: f returns no single tensor, or ``v`` does not fit the argument.
    """
    hd = _transformed(f, "diagonal")

    def form(*args: Any, **kwargs: Any) -> Tensor:
        argument, inputs, flat = _with_vector(args, argnums, "quadratic_form")
        out = hd(*inputs, tangents=argument.tangents(flat.unsqueeze(0)), **kwargs)
        _single(out, "quadratic_form")
        return out.cross[0]

    return form


def hessian_diagonal(f: Function, argnums: Argnums = 0, *, chunk_size: int | None = None) -> Function:
    """The diagonal of the Hessian, e_i^T H e_i: a pytree of ``[*output, *leaf]`` like argument ``argnums``.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, "diagonal")

    def diagonal(*args: Any, **kwargs: Any) -> Any:
        argument = _Argument(args, argnums, "hessian_diagonal")
        parts = []
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, kwargs, argument.tangents(units), argument.is_whole(units))
            _single(out, "hessian_diagonal")
            parts.append(out.cross)
        return argument.unflatten(torch.cat(parts))

    return diagonal


def laplacian(f: Function, argnums: Argnums = 0, *, chunk_size: int | None = None) -> Function:
    """The Laplacian sum_i e_i^T H e_i, shaped like f's output (one tensor).

    One component for the whole sum (the "forward Laplacian"), so its cost is that of n tangents and one more.

    Raises:
        ArgumentError: f returns no single tensor, or the argument is not of real floating-point tensors.
    """
    hd = _transformed(f, "trace")

    def trace(*args: Any, **kwargs: Any) -> Tensor:
        argument = _Argument(args, argnums, "laplacian")
        total: Any = 0
        for units in argument.units(chunk_size):
            out = _evaluated(hd, args, kwargs, argument.tangents(units), argument.is_whole(units))
            _single(out, "laplacian")
            total = total + out.cross
        return total

    return trace

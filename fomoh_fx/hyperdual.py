"""Hyper-dual values: a primal, its directional derivatives, its second directional derivatives.

Raw derivatives, never factorial-scaled (Cobb, Baydin, Pearlmutter, Jha 2024, section 4): for y = phi(x) and
directions v_1..v_K::

    primal      y    = phi(x)
    tangent_i   y_i  = phi'(x)[x_i]                                              i = 1..K
    cross_c     y_c  = phi'(x)[x_c] + sum_ij S_c,ij phi''(x)[x_i, x_j]           c = 1..C

Tangents are stacked along a leading axis of length K and cross components along one of length C, so that the
number of graph nodes depends on neither. ``None`` is the symbolic zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.utils import _pytree as pytree

from fomoh_fx.errors import ArgumentError
from fomoh_fx.records import mapped

SecondOrder = Literal["plane", "diagonal", "trace"] | None
SECOND_ORDERS = ("plane", "diagonal", "trace", None)


#: What `_pair_indices` made, for each trace under way and for eager computation.
_PAIRS: WeakKeyDictionary[Any, dict[tuple[int, torch.device], PairIndices]] = WeakKeyDictionary()


class PairIndices(NamedTuple):
    """The pairs i <= j in the order (0,0), (0,1), .. (0,K-1), (1,1), ..: int64 tensors.

    ``rows`` and ``columns`` hold the first and the second direction of each, ``rows_apart`` and ``columns_apart`` those
    of the pairs i < j, and ``place`` which of these a pair is (0 for (i,i)).
    """

    rows: Tensor
    columns: Tensor
    rows_apart: Tensor
    columns_apart: Tensor
    place: Tensor


def _pair_indices(directions: int, device: torch.device) -> PairIndices:
    """Constants also inside a trace.

    Each trace has tensors of its own: one that the body of a higher-order operator holds too, PyTorch would look for
    in there.
    """
    mode = get_proxy_mode()
    made = _PAIRS.setdefault(_Eager if mode is None else mode.tracer, {})
    if (directions, device) not in made:
        with unset_fake_temporarily(), disable_proxy_modes_tracing():
            rows, columns = torch.triu_indices(directions, directions, device=device)
            apart = rows != columns
            place = (apart.cumsum(0) - 1) * apart
            made[directions, device] = PairIndices(rows.clone(), columns.clone(), rows[apart], columns[apart], place)
    return made[directions, device]


class _Eager:
    """The key of `_PAIRS` outside any trace."""


def _square_positions(directions: int, device: torch.device) -> Tensor:
    """The number of the plane component (i, j) at [i, j] and [j, i]; made anew, for captured models too."""
    number = torch.arange(directions, device=device)
    low, high = torch.minimum(number[:, None], number), torch.maximum(number[:, None], number)
    return low * (2 * directions - 1 - low) // 2 + high


@dataclass(frozen=True)
class Components:
    """Which components are propagated: K tangents, and C fixed combinations S_c of the pairs.

    ``second_order`` names the weights S: ``"plane"`` has one component for each pair i <= j with the single entry
    S_ij = 1, ``"diagonal"`` one for each (i, i), ``"trace"`` the one sum of all (i, i), and None has no component.
    """

    directions: int
    second_order: SecondOrder

    @property
    def count(self) -> int:
        """C, the number of cross components."""
        pairs = self.directions * (self.directions + 1) // 2
        return {"plane": pairs, "diagonal": self.directions, "trace": 1, None: 0}[self.second_order]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The pairs (i, j) in the order of the cross components; a trace sums the ones it lists."""
        if self.second_order == "plane":
            return [(i, j) for i in range(self.directions) for j in range(i, self.directions)]
        return [(i, i) for i in range(self.directions)] if self.second_order else []

    @property
    def spans_pairs(self) -> bool:
        """Whether a component joins two different directions."""
        return self.second_order == "plane" and self.directions > 1

    def indices(self, device: torch.device) -> PairIndices:
        """Which directions the plane's components join."""
        return _pair_indices(self.directions, device)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stack at the first and at the second direction of every pair: [K, ...] -> two of [P, ...]."""
        if not self.spans_pairs:
            return x, x
        at = self.indices(x.device)
        return x.index_select(0, at.rows), x.index_select(0, at.columns)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A stack at the first and at the second direction of every pair i < j: [K, ...] -> two of [P - K, ...]."""
        at = self.indices(x.device)
        return x.index_select(0, at.rows_apart), x.index_select(0, at.columns_apart)

    def joined(self, alike: Tensor, apart: Tensor) -> Tensor:
        """Of what there is for every (i, i), [K, ...], and every pair i < j, [P - K, ...]: all pairs, [P, ...]."""
        at = self.indices(alike.device)
        same = (at.rows == at.columns).reshape(-1, *[1] * (alike.ndim - 1))
        return torch.where(same, alike.index_select(0, at.rows), apart.index_select(0, at.place))

    def square(self, x: Tensor) -> Tensor:
        """sum_ij S_c,ij x_i x_j elementwise: [K, ...] -> [C, ...]."""
        x_i, x_j = self.ends(x)
        return self.reduce(x_i * x_j)

    def product(self, phi: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Tensor:
        """sum_ij S_c,ij (phi(x_i, w_j) + phi(x_j, w_i)) for a phi that is bilinear and maps leading axes alike."""
        if not self.spans_pairs:
            return self.reduce(phi(x, w)) * 2
        (x_i, x_j), (w_i, w_j) = self.ends(x), self.ends(w)
        return phi(x_i, w_j) + phi(x_j, w_i)

    def gather(self, table: Tensor, row: int = 0, column: int = 1) -> Tensor:
        """sum_ij S_c,ij (T_ij + T_ji) of a table with K at the axes ``row`` and ``column``: -> [C, ...]."""
        table = table.movedim((row, column), (0, 1))
        if self.spans_pairs:
            rows, columns, *_ = self.indices(table.device)
            return table[rows, columns] + table[columns, rows]
        return self.reduce(table.diagonal(dim1=0, dim2=1).movedim(-1, 0)) * 2

    def reduce(self, diagonal: Tensor) -> Tensor:
        """The components (i, i) as they are, or for a trace their sum: [K, ...] -> [C, ...]."""
        return diagonal.sum(0, keepdim=True) if self.second_order == "trace" and self.directions > 1 else diagonal


@dataclass(eq=False)
class HyperDual:
    """A value with its first and second directional derivatives.

    Attributes:
        primal: the value; a tensor, or a pytree of the output's own structure.
        tangent: the directional derivatives, each leaf ``[K, *shape]`` in the primal's dtype. None marks a leaf
            without derivative (an integer, a non-tensor) and, inside a rule, the symbolic zero.
        cross: the second directional derivatives, each leaf ``[C, *shape]`` with the pairs in the order (0,0),
            (0,1), .. (0,K-1), (1,1), .. for ``"plane"``, ``[K, *shape]`` for ``"diagonal"``, ``shape`` for
            ``"trace"``; None where no second order was asked for.
        output: with ``loss=``, the model's output (``primal`` is then the loss); otherwise None.
        components: what was propagated, or None inside a rule.
    """

    primal: Any
    tangent: Any = None
    cross: Any = None
    output: Any = field(default=None, kw_only=True)
    components: Components | None = field(default=None, repr=False, kw_only=True)

    @property
    def active(self) -> bool:
        return self.tangent is not None or self.cross is not None

    def hessian(self) -> Any:
        """The symmetric matrix v_i^T H v_j, each leaf ``[K, K, *shape]``, of a plane (or a diagonal with K = 1).

        Raises:
            ArgumentError: for ``second_order="trace"``, ``None``, and a diagonal of several directions, which do
                not hold the off-diagonal entries.
        """
        components = self._components("hessian()")
        if components.second_order != "plane" and not (components.second_order == "diagonal" and components.count == 1):
            raise ArgumentError(
                f"second_order: hessian() needs second_order='plane', but this HyperDual was made with "
                f"second_order={components.second_order!r}"
            )
        k = components.directions
        return mapped(lambda leaf: leaf[_square_positions(k, leaf.device)], self.cross)

    # The paper's names for one hyper-dual number (real, eps1, eps2, eps1eps2): one direction twice, or two directions.

    @property
    def real(self) -> Any:
        """The paper's real part: the primal."""
        return self.primal

    @property
    def eps1(self) -> Any:
        """The paper's first tangent: direction 0."""
        self._components("eps1", at_most=2)
        return mapped(lambda leaf: leaf[0], self.tangent)

    @property
    def eps2(self) -> Any:
        """The paper's second tangent: direction K - 1 (with K = 1 the same as ``eps1``)."""
        self._components("eps2", at_most=2)
        return mapped(lambda leaf: leaf[-1], self.tangent)

    @property
    def eps1eps2(self) -> Any:
        """The paper's second-order part: the pair (0, K - 1)."""
        components = self._components("eps1eps2", at_most=2)
        if components.second_order is None or (components.directions == 2 and components.second_order != "plane"):
            raise ArgumentError(f"second_order: eps1eps2 is not held with second_order={components.second_order!r}")
        if components.second_order == "trace":
            return self.cross
        return mapped(lambda leaf: leaf[components.directions - 1], self.cross)

    def _components(self, name: str, at_most: int | None = None) -> Components:
        if self.components is None:
            raise ArgumentError(f"{name}: this HyperDual is a value inside a rule, not a result")
        if at_most is not None and self.components.directions > at_most:
            raise ArgumentError(
                f"{name}: the paper's names are for one or two directions, not {self.components.directions}; "
                "use tangent and cross"
            )
        return self.components


@dataclass(frozen=True, eq=False)
class Undefined:
    """A value inside the graph whose derivative nobody defines: it may be returned, but not used on an active path."""

    primal: Tensor


def _unflattened(leaves: Iterable[Any], components: Components | None) -> HyperDual:
    primal, tangent, cross, output = leaves
    return HyperDual(primal, tangent, cross, output=output, components=components)


pytree.register_pytree_node(
    HyperDual,
    lambda h: ([h.primal, h.tangent, h.cross, h.output], h.components),
    _unflattened,
    serialized_type_name="fomoh_fx.HyperDual",
)


def primal_of(tree: Any) -> Any:
    """The tree with every HyperDual replaced by its primal."""
    return pytree.tree_map(
        lambda x: x.primal if isinstance(x, (HyperDual, Undefined)) else x, tree, is_leaf=_is_hyperdual
    )


def hyperduals_in(tree: Any) -> list[HyperDual]:
    """Every HyperDual in the tree, in order."""
    return [x for x in pytree.tree_leaves(tree, is_leaf=_is_hyperdual) if isinstance(x, HyperDual)]


def _is_hyperdual(x: Any) -> bool:
    return isinstance(x, HyperDual)


def add(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not the symbolic zero, which absorbs nothing and is never materialised."""
    total: Tensor | None = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total

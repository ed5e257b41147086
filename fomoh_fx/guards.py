"""Guards: what a graph with dynamic dimensions holds for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
from torch import SymInt, Tensor
from torch._dynamo.source import LocalSource

_BY_LAYOUT = re.compile(r"\.(stride|storage_offset)\(\)")


class Guards:
    """What was assumed of the sizes of the (fake) arguments that were traced, as PyTorch writes and evaluates it.

    Where tensors lie in memory is no part of it: that is compared where a graph goes by it
    (:mod:`fomoh_fx.capture.layouts`).
    """

    def __init__(self, traced: Sequence[Any]) -> None:
        self.environment = traced[0].fake_mode.shape_env
        sources = [LocalSource(f"t{i}") for i in range(len(traced))]  # as evaluate_guards_expression calls them
        written = self.environment.produce_guards(traced, sources, ignore_static=False)
        self.condition = " and ".join(guard for guard in written if not _BY_LAYOUT.search(guard))
        sizes = [
            (i, d, self.environment.replace(n.node.expr))
            for i, x in enumerate(traced)
            for d, n in enumerate(x.shape)
            if isinstance(n, SymInt)
        ]
        bare = {expression for _, _, expression in sizes}
        # 2 * Dim("half"): sizes that are computed from one that no dimension has
        self.derived = [(i, d, e) for i, d, e in sizes if len(e.free_symbols) == 1 and not e.free_symbols & bare]

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they hold for the arguments of a call."""
        condition = self.condition
        for i, d, expression in self.derived:
            (root,) = expression.free_symbols
            found = sympy.solve(expression - tensors[i].shape[d], root)
            if len(found) != 1 or not found[0].is_Integer:
                return False
            name = self.environment.var_to_sources[root][0].name
            condition = re.sub(rf"\b{name}\b", str(found[0]), condition)
        return not condition or bool(self.environment.evaluate_guards_expression(condition, tensors))

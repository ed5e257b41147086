"""Printing: a stage as Python source that runs on its own, every statement with where it comes from.

The text defines ``forward``, which takes the graph's inputs in order (parameters, buffers, arguments, then one stack of
tangents for each active input) and returns the graph's flat outputs. Small constants stand in it as literals; one
with more than :data:`LITERAL` elements is a keyword argument of ``forward``, and :func:`constants` holds its value.
Statements end with a comment: the component and its primal node | dtype and shape | the user's source line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from operator import attrgetter
from types import ModuleType
from typing import Any, TextIO, cast

import torch
from torch import Tensor, fx

from fomoh_fx.passes import provenance

#: The most elements of a constant that is written out.
LITERAL = 4096

_DELETION = re.compile(r";  (?:\w+ = )+None$")
_WORD = re.compile(r"\b[A-Za-z_]\w*\b")


def code(module: fx.GraphModule) -> str:
    """The graph as the text of a Python program that defines ``forward``.

    It runs in an empty namespace. Operators of a library of your own, and custom autograd Functions, exist in the
    process that registered them, so a text that calls those runs there only.
    """
    body = _function(module, "forward", [])
    names: dict[str, Any] = {}
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            names |= part.graph.python_code("self").globals
    statements = [line.partition("  # ")[0] for line in body]
    used = {word for statement in statements for word in _WORD.findall(statement)}
    imports = _imports({name: value for name, value in names.items() if name in used})
    if any("torch.ops.fomoh_fx" in statement for statement in statements):
        imports.insert(0, "import fomoh_fx")
    return "\n".join([*imports, "", "", *body]) + "\n"


def constants(module: fx.GraphModule) -> dict[str, Tensor]:
    """The constants that :func:`code` leaves to the caller: ``forward(*inputs, **constants(module))``."""
    return {
        _variable([*path.split("."), str(node.target)]): value
        for path, part in module.named_modules()
        if isinstance(part, fx.GraphModule)
        for node, value in _tensor_constants(part)
        if _literal(value) is None
    }


def print_readable(module: fx.GraphModule, file: TextIO | None = None) -> None:
    """Print the text of :func:`code`."""
    print(code(module), end="", file=file or sys.stdout)


def _imports(names: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in names.items():
        if isinstance(value, ModuleType):
            lines.append(f"import {name}" if value.__name__ == name else f"import {value.__name__} as {name}")
        elif isinstance(value, float):
            lines.append(f"from math import {name}")
        else:
            what = value.__qualname__
            lines.append(f"from {value.__module__} import {what}" + ("" if what == name else f" as {name}"))
    return sorted(lines, key=lambda line: (line.startswith("from"), line))


def _function(module: fx.GraphModule, name: str, path: list[str]) -> list[str]:
    """The lines of one function; the branches and bodies of control flow are functions inside it."""
    lines = [f"def {name}("]
    lines += [f"    {node.name},{_comment(node)}" for node in module.graph.find_nodes(op="placeholder")]
    lines += [f"    {'' if i else '*, '}{constant}," for i, constant in enumerate(() if path else constants(module))]
    lines.append("):")
    for child, part in module.named_children():
        if isinstance(part, fx.GraphModule):
            lines += [f"    {line}" for line in _function(part, child, [*path, child])]
    statements = _statements(module)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _value(module, node, path)
            lines += [f"    {node.name} = {value}{_comment(node)}"] if value != node.name else []
        elif node.op == "output":
            lines += [f"    {line}" for line in _returned(node, statements["return"])]
        elif node.op != "placeholder":
            lines.append(f"    {statements[node.name]}{_comment(node)}")
    return lines


def _returned(node: fx.Node, statement: str) -> list[str]:
    """The return statement, with one line for each output of a flat tuple."""
    outputs = node.args[0]
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(output, fx.Node) for output in outputs):
        return [statement]
    opening, closing = "()" if isinstance(outputs, tuple) else "[]"
    return [f"return {opening}", *(f"    {output},{_comment(cast(fx.Node, output))}" for output in outputs), closing]


def _statements(module: fx.GraphModule) -> dict[str, str]:
    """The statement of each node, by its name, as PyTorch itself writes it."""
    found: dict[str, str] = {}
    for line in module.graph.python_code("self").src.splitlines():
        line = _DELETION.sub("", line.strip())
        target, equals, _ = line.partition(" = ")
        if line.startswith("return"):
            found["return"] = line
        elif equals:
            found[target.partition(":")[0].strip()] = line
    return found


def _tensor_constants(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Tensor]]:
    for node in module.graph.find_nodes(op="get_attr"):
        value = attrgetter(str(node.target))(module)
        if isinstance(value, Tensor):
            yield node, value


def _variable(path: list[str]) -> str:
    return "_".join(name for name in path if name).replace(".", "_")


def _value(module: fx.GraphModule, node: fx.Node, path: list[str]) -> str:
    """What a constant's statement assigns: a literal, the argument that stands for it, or a function inside."""
    value = attrgetter(str(node.target))(module)
    if not isinstance(value, Tensor):
        return _variable([str(node.target)])
    return _literal(value) or _variable([*path, str(node.target)])


def _literal(value: Tensor) -> str | None:
    """The tensor as an expression, or None where it is too big, or not made of plain numbers."""
    if value.numel() > LITERAL or value.is_complex() or value.layout != torch.strided or value.is_quantized:
        return None
    where = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    if value.numel() == 0:
        return f"torch.empty({list(value.shape)}, dtype={value.dtype}{where})"
    return f"torch.tensor({value.tolist()}, dtype={value.dtype}{where})"


def _comment(node: fx.Node) -> str:
    origin = provenance.of(node)
    parts = [str(origin), described(node.meta.get("val")), origin.source]
    return "  # " + " | ".join(part for part in parts if part)


def described(value: Any) -> str:
    """``float32[3, 128, 10]`` for a tensor, a tuple of these for several, the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(described(v) for v in value)})"
    return "" if value is None else type(value).__name__

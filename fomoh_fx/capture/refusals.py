"""Models that a frontend captured, or went on with, as no graph can be right: refused."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fomoh_fx.capture.assignment import COMPUTED_FROM, remembered
from fomoh_fx.capture.assignments import symbolic
from fomoh_fx.capture.program import Program
from fomoh_fx.capture.root import Root
from fomoh_fx.containers import is_a_users
from fomoh_fx.errors import CaptureError
from fomoh_fx.passes.activity import ancestors
from fomoh_fx.passes.provenance import source_line


def refuse_fake(program: Program) -> None:
    """No tensor of a frontend's own, without data, is a constant of the graph."""
    nodes = program.module.graph.find_nodes(op="get_attr")
    constants = [attrgetter(node.target)(program.module) for node in nodes]
    for constant in (*constants, *(what.tensor for what in program.inputs)):
        if isinstance(constant, FakeTensor):
            raise CaptureError(
                f"model: uses a tensor of shape {tuple(constant.shape)} that cannot be traced to an argument, a "
                "parameter or a buffer; pass it as an argument (also to a transformed function inside the model, in "
                "place of a closure), or keep it in a buffer"
            )


def refuse_without_data(program: Program) -> None:
    """A value of the graph that is a shape alone, where no input is: PyTorch has lost what it was made of."""
    if any(map(free_unbacked_symbols, symbolic(program.structure.others))):
        raise CaptureError(
            "model: returns a number that only the data decide (.item()), and a graph has no numbers; return the tensor"
        )
    graph = program.module.graph
    lost = [n for n in graph.nodes if isinstance(v := n.meta.get("val"), Tensor) and v.is_meta]
    if lost:
        used = ancestors(graph, [n for n in program.results if isinstance(n, fx.Node)])
        lost = [n for n in lost if n in used]
    if lost and not any(n.op == "placeholder" for n in lost):
        where = source_line(lost[0].stack_trace or "")
        raise CaptureError(
            "model: PyTorch does not trace the function transforms (torch.func) that it nests"
            + (f"\n  at {where}" if where else "")
        )


def refuse_remembered(tensor: Tensor, what: str, root: Root) -> None:
    """A tensor that was computed from a parameter before this call has a derivative that no graph of this call has."""
    if (source := COMPUTED_FROM.get(tensor)) is not None:
        raise remembered(what, source)
    names = {id(p): name for name, p in root.model.named_parameters()} if isinstance(root.model, nn.Module) else {}
    for leaf in _leaves_behind(tensor):
        if id(leaf) in names:
            raise remembered(what, names[id(leaf)])


def _leaves_behind(tensor: Tensor) -> list[Tensor]:
    """The leaves that reverse mode would reach from the tensor."""
    found, seen, todo = [], set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def raise_what_was_caught(root: Root) -> None:
    """A model that catches a frontend's refusal went on as it would not with numbers."""
    semantics = root.observed.semantics
    assert semantics is not None
    by_users = (error for error in semantics.undecided if _is_caught_by_a_user(error))
    caught = semantics.refusal or next(by_users, None)
    semantics.refusal = None
    semantics.undecided.clear()
    if caught is not None:
        raise caught


def _is_caught_by_a_user(error: Exception) -> bool:
    """Where an error was caught is the first frame of its traceback."""
    trace = error.__traceback__
    return trace is not None and is_a_users(trace.tb_frame.f_globals.get("__name__"))

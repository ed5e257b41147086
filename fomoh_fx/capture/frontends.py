"""The frontends in the order in which they are tried: non-strict export first, make_fx on fake tensors after it.

Both tell the model that it is being exported; at last it is captured as it runs eagerly, unless data decide.
"""

from __future__ import annotations

import gc
import logging
import re
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from operator import attrgetter
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._export.utils import _compiling_state_context
from torch._functorch import predispatch
from torch._inductor import config as inductor_config
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.export import ExportedProgram, _trace
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn.attention import SDPBackend, sdpa_kernel

from fomoh_fx.capture.assignments import COMPUTED_FROM, Same, remembered, symbolic
from fomoh_fx.capture.constants import argument, candidates, fewer, is_flag
from fomoh_fx.capture.constructors import constructors_recorded
from fomoh_fx.capture.counters import refuse_counted
from fomoh_fx.capture.dimensions import marks_kept, refusals
from fomoh_fx.capture.draws import refuse_drawn
from fomoh_fx.capture.known import fold_known
from fomoh_fx.capture.layouts import note_layouts
from fomoh_fx.capture.leaks import is_a_users, refuse_kept
from fomoh_fx.capture.literals import known_literals
from fomoh_fx.capture.overlaps import refuse_overlaps
from fomoh_fx.capture.program import Call, Input, Output, Program, Root
from fomoh_fx.capture.state import STANDARD, Keys, children, place_of, places, replaced, structure, written
from fomoh_fx.capture.threads import CAPTURING
from fomoh_fx.decompositions import decomposed
from fomoh_fx.errors import CaptureError, FomohError, UnsupportedOpError
from fomoh_fx.passes.activity import analyse, ancestors, carries_derivative
from fomoh_fx.passes.data_sizes import ADVICE, DECIDED_BY_DATA, has_sizes_from_data
from fomoh_fx.passes.dataflow import is_effectful_call
from fomoh_fx.passes.provenance import source_line
from fomoh_fx.rules.other_libraries import register_present
from fomoh_fx.rules.registry import COMPOSITES, RULES

aten = torch.ops.aten


def capture(
    model: Any,
    loss: Any,
    call: Call,
    argument_names: Sequence[str],
    dynamic_shapes: Any = None,
    refusal: FomohError | None = None,
) -> Program:
    """The graph of ``model`` (and ``loss``) for one call.

    Args:
        model: a module or a function.
        loss: a module or function of (output, *targets) that returns a scalar tensor, or None.
        call: the arguments.
        argument_names: a readable name for each tensor leaf of the call.
        dynamic_shapes: for each tensor leaf what ``torch.export`` takes, or None for static shapes.
        refusal: of the graph without known values as constants, because of a size from data in it.

    Raises:
        CaptureError: no frontend could record one graph that holds for every input of this signature.
    """
    register_present()
    run = partial(_capture, model, loss, call, argument_names, dynamic_shapes, refusal)
    with CAPTURING:
        return refuse_counted(partial(refuse_drawn, run, model, loss))


def _capture(
    model: Any,
    loss: Any,
    call: Call,
    argument_names: Sequence[str],
    dynamic_shapes: Any,
    refusal: FomohError | None = None,
) -> Program:
    foreign: list[Tensor] = []
    outside: list[nn.Module] = []
    made: list[weakref.ref[Tensor]] = []
    for _ in range(5):
        root = Root(model, loss, call, foreign, outside)
        outcome: Program | FomohError = _first_that_works(root, argument_names, dynamic_shapes)
        refused = outcome if isinstance(outcome, _DecidedByData) else refusal
        if refused is not None:
            root, outcome = _with_constants(root, refused, argument_names, dynamic_shapes, refusal is None)
        tensors, modules = _unknown(root)
        made += root.observed.semantics.made if root.observed.semantics else []
        for assignment in root.observed.assigned:
            assignment.tensors.clear()
        if not tensors and not modules:
            if isinstance(outcome, CaptureError):
                raise CaptureError(*outcome.args) from outcome.__cause__
            if isinstance(outcome, FomohError):
                raise outcome
            refuse_kept(made, outcome.structure.others)
            _refuse_fake(outcome)
            _refuse_without_data(outcome)
            return outcome
        _refuse_remembered(root, tensors)
        foreign += tensors  # capture again with what a closure holds as inputs: its values may change
        outside += modules
    raise CaptureError(
        "model: makes new tensors with data at every call that it then uses as constants; make them by torch.tensor, "
        "or keep them as buffers"
    )


def _with_constants(
    root: Root, refusal: FomohError, names: Sequence[str], dynamic_shapes: Any, may_have_sizes: bool
) -> tuple[Root, Program | FomohError]:
    """Capture again with known values as constants, but for those that the model changes.

    Whether the data may decide sizes in the graph is ``may_have_sizes``.
    """

    def is_enough(outcome: Program | CaptureError) -> bool:
        if isinstance(outcome, CaptureError):
            return False
        return may_have_sizes or not any(map(has_sizes_from_data, outcome.module.graph.nodes))

    def captured(
        constants: Mapping[str, Tensor], flags: frozenset[str] = frozenset()
    ) -> tuple[Root, Program | CaptureError]:
        again = Root(root.model, root.loss, root.call, root.foreign, list(root.outside), constants, flags)
        outcome = _first_that_works(again, names, dynamic_shapes)
        if again.observed.constants is not None and (changed := again.observed.constants.changed):
            set_here = {name for name in changed - flags if is_flag(name, constants[name])}
            left = {name: value for name, value in constants.items() if name in set_here or name not in changed}
            return captured(left, (flags - changed) | set_here)
        return again, outcome

    for constants in candidates(root, root.call.tensors, dynamic_shapes is None):
        found, outcome = captured(constants)
        if isinstance(outcome, _DecidedByData) and isinstance(refusal, _DecidedByData):
            root, refusal = found, outcome  # what else decides, and what else it refers to
        if isinstance(outcome, CaptureError) or not is_enough(outcome):
            continue
        assert found.observed.constants is not None
        for kept in fewer(found.constants or {}, found.observed.constants.used | found.flags):
            less = captured(kept, found.flags & kept.keys())
            if is_enough(less[1]):
                found, outcome = less
                break
        for name in [name for name in found.constants or () if name.startswith(argument(""))]:
            rest = {other: value for other, value in (found.constants or {}).items() if other != name}
            without = captured(rest)
            if is_enough(without[1]):  # that one decides nothing
                found, outcome = without
        return found, outcome
    return root, refusal


def _unknown(root: Root) -> tuple[list[Tensor], list[nn.Module]]:
    """The tensors and modules that the model used in its last run without owning them, and that outlive the run."""
    if root.observed.semantics is None:
        return [], []
    if root.observed.outside:
        gc.collect()  # a module that the model makes anew at every call is gone by now
    modules = [module for ref in root.observed.outside if (module := ref()) is not None]
    tensors = root.observed.semantics.foreign.values()
    return [t for t in tensors if not any(_owns(module, t) for module in (root, *modules))], modules


def _refuse_remembered(root: Root, tensors: Sequence[Tensor]) -> None:
    """A tensor that was computed from a parameter before this call has a derivative that no graph of this call has."""
    names = {id(p): name for name, p in root.model.named_parameters()} if isinstance(root.model, nn.Module) else {}
    for tensor in tensors:
        if (source := COMPUTED_FROM.get(tensor)) is not None:
            raise remembered(f"a tensor of shape {tuple(tensor.shape)}", source)
        for leaf in _leaves_behind(tensor):
            if id(leaf) in names:
                raise remembered(f"a tensor of shape {tuple(tensor.shape)}", names[id(leaf)])


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


def _owns(module: nn.Module, tensor: Tensor) -> bool:
    return any(tensor is t for t in (*module.parameters(), *module.buffers()))


def _first_that_works(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program | CaptureError:
    """What the first frontend that captures the root makes of it, or why none does.

    Arguments with tangents require a gradient meanwhile. Where autograd refuses that, for want of a backward, which
    expanding forward does not need, they require none; then the model must not ask.
    """
    outcome = _by_some_frontend(root, names, dynamic_shapes)
    if not isinstance(outcome, CaptureError) or isinstance(outcome, _DecidedByData) or not root.call.differentiated:
        return outcome
    differentiated, root.call.differentiated = root.call.differentiated, ()
    without = _by_some_frontend(root, names, dynamic_shapes)
    root.call.differentiated = differentiated
    is_told = root.observed.semantics is None or root.observed.semantics.has_denied
    return outcome if is_told or isinstance(without, CaptureError) else without


def _by_some_frontend(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program | CaptureError:
    refused: list[str] = []
    decided_by_data = False
    for name, frontend in FRONTENDS.items():
        if decided_by_data and name == _AS_EAGERLY:  # where a model asks for more values
            continue
        try:
            with _tracing_state(), _foreign_restored(root), _containers_kept(root):
                program = frontend(root, names, dynamic_shapes)
                _raise_what_was_caught(root)
        except (UnsupportedOpError, CaptureError) as error:
            where = source_line("".join(traceback.format_tb(error.__traceback__)))
            raise type(error)(f"{error}\n  at {where}" if where else str(error)) from error
        except FomohError:
            raise
        except Exception as error:
            refused.append(f"{name}: {_reason(error)}")
            decided_by_data |= isinstance(error, DECIDED_BY_DATA)
            if dynamic_shapes is not None:  # only torch.export captures them
                reasons = refusals(error, names) or [_reason(error)]
                kind = _DecidedByData if decided_by_data else CaptureError
                return kind("\n  ".join(["dynamic_shapes: torch.export does not capture them:", *reasons]))
            continue
        program.refused, program.outside = refused, tuple(root.outside)
        program.constants = [(_constant(root, name, names), v.clone()) for name, v in (root.constants or {}).items()]
        _share_tied(program)
        fold_known(program, root.foreign)
        _name_inputs(program)
        refuse_overlaps(program, [what.value(root.call.tensors) for what in program.inputs])
        assert root.observed.semantics is not None
        note_layouts(program, root.call.tensors, root.observed.semantics.asks_for_offset)
        _note_assignments(program, root, names)
        program.ties = _ties(program, root)
        return program
    kind, lines = (_DecidedByData, [*refused, ADVICE]) if decided_by_data else (CaptureError, refused)
    return kind("\n  ".join(["model: no frontend could capture it as one graph", *lines]))


def _raise_what_was_caught(root: Root) -> None:
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


def _note_assignments(program: Program, root: Root, names: Sequence[str]) -> None:
    """The last outputs are what the model assigns. No value that an earlier call computed from a parameter is used."""
    inputs = list(zip(program.placeholders, program.inputs, strict=True))
    parameters = {node: what.name for node, what in inputs if what.kind == "parameter" and carries_derivative(node)}
    used = [what for node, what in inputs if node.users]
    i = len(program.outputs) - sum(made.count for made in root.observed.assigned)
    kept = []
    for made in root.observed.assigned:
        made.module = root.get_submodule(made.path or "")
        for leaf in made.leaves:
            if isinstance(leaf, Same):
                leaf.value = _constant(root, leaf.name, names).value
        results = program.results[i : i + made.count]
        made.computed_from = [_computed_from(result, program, parameters) for result in results]
        source = next(filter(None, made.computed_from), None)
        if source and len(made.keys) > 1 and made.is_new and all(_is_of_parameters(r, program) for r in results):
            del program.outputs[i : i + made.count]  # a cache that stays empty: each call computes it anew
            left = program.results[:i] + program.results[i + made.count :]
            program.module.graph.output_node().args = (left,)
            continue
        if source and any(what.module is made.module and _overlap(what.keys, made.keys) for what in used):
            raise remembered(f"its attribute {made.name}", source)
        state = Input("buffer", made.name, module=made.module, attribute=made.keys[0], inside=made.keys[1:])
        program.outputs[i : i + made.count] = [Output("assignment", state)] * made.count
        i += made.count
        kept.append(made)
    for what in used:
        if what.module is not None and (source := COMPUTED_FROM.get(what.value(()))) is not None:
            raise remembered(f"its attribute {written(what.keys)}", source)
    program.module.recompile()
    program.assignments, program.numbers = kept, root.observed.numbers
    deep = [(made.module, made.keys[0]) for made in root.observed.assigned if not made.is_tensor]
    deep += [(what.module, what.attribute) for what in used if what.inside]
    attributes = {(id(module), name): (module, name) for module, name in deep if module is not None}
    program.structures = [
        (module, name, structure(getattr(module, name, None))) for module, name in attributes.values()
    ]


def _refuse_fake(program: Program) -> None:
    """No tensor of a frontend's own, without data, is a constant of the graph."""
    nodes = program.module.graph.find_nodes(op="get_attr")
    constants = [attrgetter(node.target)(program.module) for node in nodes]
    for constant in (*constants, *(what.tensor for what in program.inputs)):
        if isinstance(constant, FakeTensor):
            raise CaptureError(
                f"model: uses a tensor of shape {tuple(constant.shape)} that cannot be traced to an argument, a "
                "parameter or a buffer; pass it as an argument, or keep it in a buffer"
            )


def _refuse_without_data(program: Program) -> None:
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


def _ties(program: Program, root: Root) -> list[list[tuple[nn.Module, Keys]]]:
    """The places of each tensor that is an input and has several: the graph reads one of them."""
    inputs = {id(what.value(())) for what in program.inputs if what.module is not None}
    found: dict[int, list[tuple[nn.Module, Keys]]] = {}
    for module in root.modules():
        for keys, tensor in places(module) if module is not root else ():
            if id(tensor) in inputs:
                found.setdefault(id(tensor), []).append((module, keys))
    return [several for several in found.values() if len(several) > 1]


def _is_of_parameters(result: fx.Node, program: Program) -> bool:
    """Whether a result depends only on parameters, and on what no call changes: it is a cache."""
    changed = {what.changes for what in program.outputs if what.kind == "change"}
    before = ancestors(program.module.graph, [result])
    inputs = [what for node, what in zip(program.placeholders, program.inputs, strict=True) if node in before]
    return not any(map(is_effectful_call, before)) and all(
        what.kind != "argument" and what not in changed for what in inputs
    )


def _computed_from(result: fx.Node, program: Program, parameters: dict[fx.Node, str]) -> str | None:
    """The first parameter in which a result has a derivative."""
    active = analyse(program.module.graph, parameters, [result]).active
    return next((name for node, name in parameters.items() if node in active), None)


def _overlap(one: Keys, other: Keys) -> bool:
    """Whether one place is in the other."""
    return all(a == b for a, b in zip(one, other, strict=False))


class _DecidedByData(CaptureError):
    """The values of tensors decide what the model does."""


@contextmanager
def _foreign_restored(root: Root) -> Iterator[None]:
    """Capture changes no state: what the model changes in place without owning it is as before."""
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in root.observed.before:
                tensor.copy_(before)


@contextmanager
def _containers_kept(root: Root) -> Iterator[None]:
    """A tracer leaves copies of the containers in a module's attributes; others may refer to these."""
    before = [
        (module, name, value)
        for module in root.modules()
        for name, value in vars(module).items()
        if name not in STANDARD and children(value) is not None
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            if name in vars(module) and vars(module)[name] is not value:
                vars(module)[name] = value


def _distinct(root: Root) -> tuple[Tensor, ...]:
    """The arguments, each a tensor of its own: frontends identify inputs by tensor, and the next call may differ.

    A tensor that is passed twice, or that is a parameter too, is replaced by an empty one like it: only values differ.
    """
    seen = {id(t) for t in (*root.parameters(), *root.buffers())}
    distinct = []
    for tensor in root.call.tensors:
        if id(tensor) in seen:
            size, stride = tensor.shape, tensor.stride()
            tensor = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)
        seen.add(id(tensor))
        distinct.append(tensor)
    for i in root.call.differentiated:  # not as leaves, which nobody may change in place
        distinct[i] = _requiring_gradient(distinct[i])
    return tuple(distinct)


def _requiring_gradient(x: Tensor) -> Tensor:
    """A copy that is no leaf, laid out alike: a model may read the strides, and the offset in the storage."""
    copied = x.detach().requires_grad_().clone()
    if (copied.stride() == x.stride() and x.storage_offset() == 0) or x.numel() == 0:
        return copied
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    storage = torch.zeros(x.storage_offset() + extent, dtype=x.dtype, device=x.device).requires_grad_().clone()
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _share_tied(program: Program) -> None:
    """One tensor under several names is one input, under its first name: export lists it under each of them."""
    first: dict[int, tuple[fx.Node, Input]] = {}
    kept: list[Input] = []
    tied: list[tuple[Input, Input]] = []
    for node, what in zip(program.placeholders, program.inputs, strict=True):
        if what.module is not None:
            same, there = first.setdefault(id(what.value(())), (node, what))
            if same is not node:
                node.replace_all_uses_with(same)
                program.module.graph.erase_node(node)
                tied.append((there, what))
                continue
        kept.append(what)
    program.inputs, program.tied = kept, tied


def _name_inputs(program: Program) -> None:
    """Inputs get the names that the user knows: ``layer_0_weight``, ``x``."""
    for node, what in zip(program.placeholders, program.inputs, strict=True):
        node._rename(re.sub(r"\W", "_", what.name))
        node.target = node.name
    program.module.recompile()


@contextmanager
def _tracing_state() -> Iterator[None]:
    """Capture does not depend on the caller's grad mode: what the model itself stops is recorded by the semantics."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fx.traceback.preserve_node_meta())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about PyTorch's own calls
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # so is this
        stack.enter_context(quiet("torch._subclasses.fake_tensor"))
        stack.enter_context(quiet("torch.fx.experimental.symbolic_shapes"))
        stack.enter_context(patch.object(_trace, "print", lambda *_, **__: None, create=True))  # a graph
        stack.enter_context(patch.object(torch, "from_numpy", torch.as_tensor))  # which frontends see
        stack.enter_context(_transforms_left())
        stack.enter_context(known_literals())
        stack.enter_context(constructors_recorded())
        stack.enter_context(_without_checks_of_values())
        yield


@contextmanager
def _transforms_left() -> Iterator[None]:
    """The function transforms in which a frontend failed are over: everything after it would run inside them."""
    depth, level = torch._C._functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level
    try:
        yield
    finally:
        if level < 0:
            with suppress(RuntimeError):  # none was left
                torch._C._exit_dual_level(level=0)  # the only one that PyTorch can enter
            forward_ad._current_level = level
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """What a frontend logs about a refusal is part of our own error."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _without_checks_of_values() -> Iterator[None]:
    """PyTorch's own branches on data that do not change the result: validation of distributions, hints of causality."""
    transformer, distribution = nn.modules.transformer, torch.distributions.Distribution
    detect, validate = transformer._detect_is_causal_mask, distribution._validate_args
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)  # type: ignore[assignment]
    distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        distribution.set_default_validate_args(validate)


def _reason(error: Exception) -> str:
    """The first line of what a frontend said, and the user's line that it was at."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    where = source_line(trace)
    message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{type(error).__name__}: {message}" + (f" (at {where})" if where else "")


def _from_export(root: Root, names: Sequence[str], dynamic_shapes: Any) -> Program:
    tensors = _distinct(root)
    shapes = None if dynamic_shapes is None else {"tensors": tuple(dynamic_shapes)}
    with marks_kept(tensors):
        exported = torch.export.export(root, tensors, strict=False, dynamic_shapes=shapes)
    for node in exported.graph_module.graph.find_nodes(op="placeholder"):
        node.meta.pop("custom", None)  # where Dynamo captured a branch, it names itself, and then refuses another name
    _refuse_transforms(exported)
    keeps_draws = inductor_config.patch(fallback_random=True)  # unused ones, too, as the model draws them
    with _views_in_any_layout(), keeps_draws:
        exported = decomposed(exported, whole=[*RULES, *COMPOSITES, aten.detach.default])
    arguments = iter(range(len(tensors)))
    inputs = []
    for spec in exported.graph_signature.input_specs:
        target = spec.target or ""
        if spec.kind == InputKind.USER_INPUT:
            index = next(arguments)
            inputs.append(Input("argument", names[index], index))
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            inputs.append(_state(root, target))
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            inputs.append(Input("constant", target, tensor=exported.constants[target]))
        elif spec.kind == InputKind.TOKEN:  # make_fx knows none
            raise NotImplementedError("an operator with an effect, such as a check of values under vmap")
        elif isinstance(exported.constants.get(target), torch.Generator):
            raise CaptureError(
                "model: draws with a torch.Generator of its own, which a graph does not keep. Draw with torch's "
                "default one, or pass the numbers as an argument"
            )
        else:
            raise CaptureError(f"model: an input of kind {spec.kind.name} ({target}) is not supported")
    outputs = []
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_OUTPUT:
            outputs.append(Output("value"))
        elif spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            outputs.append(Output("change", _state(root, spec.target or "")))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            listed = [s.arg.name for s in exported.graph_signature.input_specs]
            outputs.append(Output("change", inputs[listed.index(spec.target or "")]))
        else:
            raise CaptureError(f"model: an output of kind {spec.kind.name} ({spec.target}) is not supported")
    structure = root.observed.structure
    assert structure is not None
    return Program(exported.graph_module, inputs, outputs, structure, "torch.export")


def _refuse_transforms(exported: ExportedProgram) -> None:
    """Function transforms that PyTorch's decompositions lose or crash the process on; make_fx traces through them.

    These are forward mode inside the model, whose outer levels may vanish, and what a transform that is over
    (``torch.func.grad``) has left as a constant.
    """
    if exported.graph.find_nodes(op="call_function", target=predispatch._make_dual):
        raise NotImplementedError("torch.export does not keep forward mode inside a model")
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if any(isinstance(constant, Tensor) and is_wrapped(constant) for constant in exported.constants.values()):
        raise NotImplementedError("torch.export makes the argument of a function transform a constant")


def _views_in_any_layout() -> Any:
    """Let a view be a copy: what a change in place becomes may be laid out so that it has no view (reshape follows)."""
    table = fake_impls.op_implementations_dict
    return patch.dict(table, {aten.view.default: partial(table[aten.view.default], allow_copy=True)})


def _state(root: Root, target: str) -> Input:
    """The parameter or buffer that the root calls ``target``: the model's own name for ``model.name``."""
    if target.startswith("foreign_"):
        tensor = root.foreign[int(target.removeprefix("foreign_"))]
        for owner in root.modules():
            if owner is not root and (keys := place_of(owner, tensor)) is not None:
                return Input("constant", target, module=owner, attribute=keys[0], inside=keys[1:])
        return Input("constant", target, tensor=tensor)
    parent, _, attribute = target.rpartition(".")
    module = root.get_submodule(parent)
    is_parameter = attribute in module._parameters  # under functional_call also a plain tensor
    kind: Literal["parameter", "buffer"] = "parameter" if is_parameter else "buffer"
    return Input(kind, target.removeprefix("model."), module=module, attribute=attribute)


def _constant(root: Root, name: str, names: Sequence[str]) -> Input:
    """What a constant stands for."""
    if not name.startswith(argument("")):
        return _state(root, name)
    index = int(name.removeprefix(argument("")))
    return Input("argument", names[index], index)


def _from_make_fx(root: Root, names: Sequence[str], dynamic_shapes: Any, is_exporting: bool = True) -> Program:
    owned = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    tensors = _distinct(root)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [fake_mode.from_tensor(t, static_shapes=True) for t in (*owned.values(), *tensors)]

    def functional(*flat: Tensor) -> list[Tensor]:
        others = dict(zip(map(id, owned.values()), flat, strict=False))
        with replaced(root, others):
            return root(*flat[len(owned) :])

    record = partial(make_fx, tracing_mode="real", _allow_non_fake_inputs=True, record_stack_traces=True)
    table = {aten.native_batch_norm.default: _batch_norm}
    as_under_export = _compiling_state_context() if is_exporting else nullcontext()  # for is_compiling()
    with fake_mode, sdpa_kernel(SDPBackend.MATH), as_under_export, _checks_recorded():
        module = record(functional, table)(*fakes)
        for node in module.graph.find_nodes(op="call_function", target=aten.detach.default):
            node.replace_all_uses_with(node.args[0])  # how autograd saves a value; the model's own are stop_gradient
        for node in module.graph.find_nodes(op="call_function", target=aten._local_scalar_dense.default):
            if not node.users:  # a number that was known: the graph is for it
                module.graph.erase_node(node)
        # functionalized after recording: a model that calls torch.autograd.grad cannot run inside functionalize
        with _views_in_any_layout(), torch.no_grad():  # where leaves may change in place
            module = record(torch.func.functionalize(fx.Interpreter(module).run, remove="mutations"))(*fakes)
    inputs = [_state(root, name) for name in owned]
    inputs += [Input("argument", name, i) for i, name in enumerate(names)]
    assert root.observed.structure is not None
    outputs = _mutations_as_outputs(module, inputs)
    return Program(module, inputs, outputs, root.observed.structure, "make_fx")


@contextmanager
def _checks_recorded() -> Iterator[None]:
    """``torch._check_tensor_all`` becomes an assertion in the graph; export records it itself."""

    def check(error: type[Exception], condition: Tensor, message: Callable[[], str] | None = None) -> None:
        torch._assert_async(condition.all(), "a check of the model failed" if message is None else str(message()))

    before = torch._check_tensor_all_with
    torch._check_tensor_all_with = check
    try:
        yield
    finally:
        torch._check_tensor_all_with = before


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float
) -> Any:
    """The operator that says that it changes the running statistics: native_batch_norm does so silently."""
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    if not training:
        return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, variance, momentum, eps)
    return aten._native_batch_norm_legit.default(x, weight, bias, mean, variance, training, momentum, eps)


def _mutations_as_outputs(module: fx.GraphModule, inputs: list[Input]) -> list[Output]:
    """Turn the final copies into inputs that functionalization leaves into outputs."""
    placeholders = module.graph.find_nodes(op="placeholder")
    (results,) = module.graph.output_node().args
    new: list[Any] = []
    outputs: list[Output] = []
    for node in module.graph.find_nodes(op="call_function", target=aten.copy_.default):
        what = inputs[placeholders.index(node.args[0])]
        new.append(node.args[1])
        outputs.append(Output("change", what))
        module.graph.erase_node(node)
    values = list(results) if isinstance(results, (list, tuple)) else [results]
    module.graph.output_node().args = ((*new, *values),)
    module.recompile()
    return outputs + [Output("value")] * len(values)


_AS_EAGERLY = "make_fx without torch.compiler.is_exporting"
FRONTENDS: dict[str, Callable[[Root, Sequence[str], Any], Program]] = {
    "torch.export": _from_export,
    "make_fx": _from_make_fx,
    _AS_EAGERLY: partial(_from_make_fx, is_exporting=False),
}

"""transform(): a model becomes a module that returns hyper-dual values, specialised once for each signature."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fomoh_fx import inspect as inspection
from fomoh_fx import lower
from fomoh_fx.cache import MOST, Cache
from fomoh_fx.capture import Call, Program, capture
from fomoh_fx.capture.nested import examples, is_a_part, outside_of_capture, refuse_differentiated
from fomoh_fx.capture.reading import kind_of
from fomoh_fx.capture.threads import CAPTURING, is_compiling
from fomoh_fx.capture.tracing import quiet
from fomoh_fx.dynamic_shapes import dynamic_dims, must_vary
from fomoh_fx.errors import ArgumentError, CaptureError, SpecialisationError, UnsupportedOpError
from fomoh_fx.garbage import uncollected
from fomoh_fx.hyperdual import SECOND_ORDERS, Components, HyperDual, SecondOrder
from fomoh_fx.low_rank import factors
from fomoh_fx.passes import pipeline
from fomoh_fx.passes.activity import analyse
from fomoh_fx.passes.data_sizes import ADVICE
from fomoh_fx.records import opened
from fomoh_fx.seeds import Seeds, input_seeds, parameter_seeds, refuse_lazy, selected_parameters
from fomoh_fx.signature import Signature, argument_kind_of, modes, modules_of, plain_settings, signature_of
from fomoh_fx.specialization import Evaluation, Specialization, outside_of

Curvature = Literal["hessian", "ggn"]
#: Arguments of :func:`transform` that are attributes of what it returns.
_ASKED = ("wrt", "second_order", "curvature", "first_order")


def transform(
    model: nn.Module | Callable[..., Any],
    loss: Callable[..., Tensor] | None = None,
    *,
    wrt: str | Iterable[str] = "parameters",
    second_order: SecondOrder = "plane",
    curvature: Curvature = "hessian",
    first_order: bool = True,
) -> HyperDualModule:
    """Compile a model into its hyper-dual expansion.

    Args:
        model: an ``nn.Module`` or a function of tensors. It is not changed, and its parameters are shared.
        loss: ``loss(output, *targets)`` returns a scalar tensor; the result is then the loss's derivatives.
        wrt: ``"parameters"``, ``"inputs"``, one fnmatch pattern of parameter names, or an iterable of names and
            patterns: what tangents may be given for.
        second_order: ``"plane"`` for v_i^T H v_j of all pairs i <= j, ``"diagonal"`` for v_i^T H v_i, ``"trace"``
            for sum_i v_i^T H v_i in one component, None for first order only.
        curvature: ``"hessian"`` is exact; ``"ggn"`` is the generalised Gauss-Newton form
            H_ij = z_i^T (d^2 loss / dz^2) z_j in the model's output z, and needs ``loss``.
        first_order: whether the result has first derivatives; False leaves out what only they need, and ``tangent`` is
            None.

    Returns:
        A :class:`HyperDualModule`: ``hd(*args, tangents=V, targets=(y,), **kwargs)`` returns a :class:`HyperDual`.

    Raises:
        ArgumentError: an argument does not fit; the message begins with its name.
    """
    return HyperDualModule(
        model, loss, wrt=wrt, second_order=second_order, curvature=curvature, first_order=first_order
    )


class HyperDualModule(nn.Module):
    """A model's hyper-dual expansion; parameters, buffers and ``state_dict`` are the model's own, under its names.

    Attributes:
        most_specializations: how many specialisations are kept, for all signatures and values that decide. Beyond it
            the least recently used one is dropped with a warning, and captured again when a call needs it.
    """

    most_specializations: int = MOST
    _latest: Specialization | None
    model: Any
    loss: Callable[..., Tensor] | None

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        loss: Callable[..., Tensor] | None = None,
        *,
        wrt: str | Iterable[str] = "parameters",
        second_order: SecondOrder = "plane",
        curvature: Curvature = "hessian",
        first_order: bool = True,
    ) -> None:
        super().__init__()
        if not callable(model):
            raise ArgumentError(f"model: expected a module or a function, got {type(model).__name__}")
        if isinstance(model, HyperDualModule):
            raise ArgumentError("model: is already transformed")
        if loss is not None and not callable(loss):
            raise ArgumentError(f"loss: expected a function of (output, *targets), got {type(loss).__name__}")
        for name, part in {"model": model, "loss": loss}.items():
            if isinstance(part, nn.Module) and any(isinstance(m, torch.jit.ScriptModule) for m in part.modules()):
                raise ArgumentError(
                    f"{name}: is TorchScript, or has such a part, whose code cannot be captured; give the module that "
                    "was scripted or traced"
                )
        if second_order not in SECOND_ORDERS:
            raise ArgumentError(f"second_order: expected one of {SECOND_ORDERS}, got {second_order!r}")
        if curvature not in ("hessian", "ggn"):
            raise ArgumentError(f"curvature: expected 'hessian' or 'ggn', got {curvature!r}")
        if curvature == "ggn" and loss is None:
            raise ArgumentError("curvature: 'ggn' needs loss=, the boundary between model and loss")
        if not first_order and second_order is None:
            raise ArgumentError("first_order: with second_order=None there is nothing else to compute")
        if isinstance(model, nn.Module):  # share the model's own tables, so that names have no prefix
            self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.__dict__.update(model=model, loss=loss)
        self.second_order, self.curvature, self.first_order = second_order, curvature, first_order
        self.wrt = wrt if isinstance(wrt, str) else _names(wrt)
        self.lowering: lower.Lowering = lower.eager
        self._forget()
        if self.wrt != "inputs":
            selected_parameters(self.module, self.wrt)

    def __setattr__(self, name: str, value: Any) -> None:
        """What was asked of ``transform`` stays as it is: it decides what is compiled."""
        if name in _ASKED and name in self.__dict__ and value != self.__dict__[name]:
            raise ArgumentError(f"{name}: was given when the model was transformed; call fomoh_fx.transform again")
        super().__setattr__(name, value)

    @property
    def module(self) -> nn.Module:
        """The model as a module; an empty one for a function."""
        return self.model if isinstance(self.model, nn.Module) else nn.Module()

    def forward(
        self, *args: Any, tangents: Any = None, targets: Sequence[Any] | None = None, **kwargs: Any
    ) -> HyperDual:
        """The value with its first and second directional derivatives.

        Args:
            args, kwargs: the model's own arguments.
            tangents: for parameters a mapping name -> ``[K, *shape]``, or a :class:`LowRank` of that shape; a name left
                out is inactive. For inputs a
                sequence with each argument's own structure, or a mapping from the argument names of ``forward``,
                with ``[K, *shape]`` leaves and None where inactive.
            targets: what the loss takes after the model's output; without a loss an ordinary keyword of the model.

        Raises:
            ArgumentError: a tangent has the wrong shape, dtype or device, an unknown name, another K, or lies
                outside ``wrt``; the message begins with ``tangents``.
            CaptureError, UnsupportedOpError: the model cannot be captured, or has an operator without exact rule.
        """
        if is_a_part():
            return self._forward_as_a_part(args, kwargs, tangents, targets)
        if is_compiling():
            return self._forward_under_dynamo(args, kwargs, tangents, targets)
        return self.prepare(*args, tangents=tangents, targets=targets, **kwargs)()

    def prepare(
        self, *args: Any, tangents: Any = None, targets: Sequence[Any] | None = None, **kwargs: Any
    ) -> Evaluation:
        """What a call with these arguments evaluates, before it does; specialised if need be."""
        call, seeds = self._bind(args, kwargs, tangents, targets)
        found = self._specialize(call, seeds)
        given = call.holder if found.program.changes_containers else None
        return Evaluation(found, call.tensors, factors(seeds.stacks), given)

    def _forward_as_a_part(self, args: Any, kwargs: Any, tangents: Any, targets: Any) -> HyperDual:
        """What a model that calls this while it is captured gets, or ``torch.func.vmap``: operations of its own."""
        refuse_differentiated((args, kwargs, tangents, targets))
        given = examples((args, kwargs, tangents, targets))
        with outside_of_capture():
            found = self._specialize(*self._bind(*given))
        if any(what.kind == "argument" for what, _ in found.program.constants):
            raise CaptureError(
                "model: calls a transformed function in which the values of an argument decide a branch or a shape, "
                "while it is captured itself, when they are not known"
            )
        call, seeds = self._bind(args, kwargs, tangents, targets)
        return Evaluation(found, call.tensors, factors(seeds.stacks), call.holder)()

    def _forward_under_dynamo(self, args: Any, kwargs: Any, tangents: Any, targets: Any) -> HyperDual:
        """What torch.compile(hd) traces: only what Dynamo can read, choosing among the specialisations that exist."""
        leaves = pytree.tree_leaves((args, kwargs, () if targets is None else tuple(targets)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        for specialization in self._traced:
            stacks = specialization.stacks_of(tangents)
            program = specialization.program
            if program.constants or program.structures or program.goes_by_offset:  # Dynamo cannot read if they changed
                continue
            if program.changes_containers or program.keeps_sizes:  # nor follow what is left there
                continue
            if stacks is not None and specialization.fits(tensors, stacks, others):
                return specialization(tensors, stacks)
        return _refuse_untraced()

    def trace(
        self,
        *args: Any,
        tangents: Any = None,
        targets: Sequence[Any] | None = None,
        dynamic_shapes: Any = None,
        **kwargs: Any,
    ) -> Specialization:
        """Specialise without running, and return the specialisation.

        Args:
            args, kwargs, tangents, targets: as in a call.
            dynamic_shapes: as in ``torch.export``: a mapping from argument names (``"targets"`` for the tuple of
                targets) or a sequence, with ``{dimension: Dim}``, a tuple with an entry for each dimension, or None
                in place of each tensor. An entry is a ``torch.export.Dim`` (the same one for sizes that are equal,
                with a range if need be), ``Dim.DYNAMIC``, or ``Dim.AUTO``, which may turn out fixed. Calls that differ
                only in these dimensions are served without tracing again, as are dimensions marked by
                ``torch._dynamo.mark_dynamic``; a size outside what the graph holds for (0 and 1 often are) is
                traced on its own. Trace with sizes of at least 2.

        Raises:
            ArgumentError: ``dynamic_shapes`` does not fit the arguments.
            CaptureError: ``torch.export`` fixes a dimension, or does not capture the model.
            SpecialisationError: a rule fixes a dimension.
        """
        call, seeds = self._bind(args, kwargs, tangents, targets)
        return self._specialize(call, seeds, dynamic_shapes)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any], tangents: Any, targets: Any) -> tuple[Call, Seeds]:
        refuse_lazy(self.module)
        if self.loss is None and targets is not None:
            kwargs = {**kwargs, "targets": targets}
            targets = None
        if targets is not None and not isinstance(targets, (tuple, list)):
            raise ArgumentError(f"targets: expected a tuple of the loss's arguments, got {type(targets).__name__}")
        call = Call(args, kwargs, tuple(targets or ()))
        if tangents is None:
            raise ArgumentError("tangents: missing; give the directions, e.g. {name: torch.randn(K, *parameter.shape)}")
        if self.wrt == "inputs":
            return call, input_seeds(self.model, call, tangents)
        return call, parameter_seeds(self.module, self.wrt, tangents)

    def _specialize(self, call: Call, seeds: Seeds, dynamic_shapes: Any = None) -> Specialization:
        signature = signature_of(self.model, self.loss, call, seeds)
        dims = dynamic_dims(self.model, call, dynamic_shapes)
        found = self._found(call, signature, dims)
        if found is None:
            with CAPTURING, uncollected():  # another thread may have added it meanwhile
                found = self._found(call, signature, dims) or self._added(call, seeds, signature, dims)
        self._latest = found
        return found

    def _found(self, call: Call, signature: Signature, dims: list[dict[int, Any]] | None) -> Specialization | None:
        return self._specializations.find(signature, lambda s: s.covers(dims) and s.holds(call.tensors))

    def _added(
        self, call: Call, seeds: Seeds, signature: Signature, dims: list[dict[int, Any]] | None
    ) -> Specialization:
        """One that serves the call, found again by its signature."""
        serving = (s for s in self._traced if s.covers(dims) and s.serves(signature, call.tensors))
        found = next((s for s in serving if s.holds(call.tensors)), None)
        if found is None:
            found = self._compile(call, seeds, signature, dims)
            found.signature = signature = signature_of(self.model, self.loss, call, seeds)  # without what it counts up
        key = replace(found.signature, shapes=signature.shapes)  # the rest is equal, and not kept for every size
        self._specializations.add(key, found, self.most_specializations)
        found.traced_with.append(
            [[argument_kind_of(t) for t in call.tensors], [kind_of(t) for t in factors(seeds.stacks)]]
        )
        return found

    def _compile(
        self, call: Call, seeds: Seeds, signature: Signature, dims: list[dict[int, Any]] | None
    ) -> Specialization:
        _check_call(self.model, self.loss, call)
        names = argument_names(self.model, call)
        call.differentiated = [owner for owner in seeds.owners if isinstance(owner, int)]
        program = capture(self.model, self.loss, call, names, dims)
        if dims is None and (known := next((s for s in self._traced if s.compiles(program, signature)), None)):
            return self._specialization(program, known.compiled, known.run, call, seeds, signature)
        try:
            with quiet("torch._subclasses.fake_tensor"):
                return self._expanded(program, call, seeds, signature, dims)
        except UnsupportedOpError as error:
            if ADVICE not in str(error):
                raise
            program = capture(self.model, self.loss, call, names, dims, refusal=error)
        return self._expanded(program, call, seeds, signature, dims)

    def _expanded(
        self, program: Program, call: Call, seeds: Seeds, signature: Signature, dims: list[dict[int, Any]] | None
    ) -> Specialization:
        positions = seeds.positions(program)
        values = [i for i, out in enumerate(program.outputs) if out.kind == "value"]
        asked = values[:1] if self.loss is not None else [i for i in values if _is_float(program.results[i])]
        components = Components(seeds.directions, self.second_order)
        request = pipeline.Request(
            positions,
            asked,
            components,
            values[1:] if self.curvature == "ggn" and self.second_order else (),
            seeds.forms,
            self.first_order,
        )
        compiled = pipeline.run(program.module, request)
        if request.first_order_above and not compiled.layout.crosses and _reaches(program, positions, values[1:]):
            raise ArgumentError(
                "curvature: the loss has no second derivative in the model's output, so the generalised Gauss-Newton "
                "plane would be zero; let the model return logits and use e.g. cross_entropy as the loss"
            )
        if dims is not None:
            _refuse_fixed(program, dims)
        run = self.lowering(compiled.final, dims is not None)
        return self._specialization(program, compiled, run, call, seeds, signature, dims)

    def _specialization(
        self, program: Program, compiled: pipeline.Compiled, run: Callable[..., Any], call: Call, seeds: Seeds,
        signature: Signature, dims: list[dict[int, Any]] | None = None,
    ) -> Specialization:  # fmt: skip
        tops = [top for top in (self.model, self.loss, *program.outside) if isinstance(top, nn.Module)]
        counted = {(module, name) for module, name, _ in program.counts}
        return Specialization(
            program,
            compiled,
            Components(seeds.directions, self.second_order),
            self.loss is not None,
            self.first_order,
            replace(seeds, stacks=()),
            signature,
            dims,
            traced_with=[],
            others=list(call.others),
            modes=modes(),
            outside=outside_of(program),
            parts=[(top, modules_of(top)) for top in tops],
            settings=[setting for setting in plain_settings(*tops) if setting[:2] not in counted],
            lowering=self.lowering,
            run=run,
        )

    def train(self, mode: bool = True) -> HyperDualModule:
        """Set the model's own training flags."""
        self.module.train(mode)
        return self

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The model's own flag."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Only the model's own flag counts: ``nn.Module`` sets one when it is made."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy specialises itself anew: graphs belong to the model that they were captured from."""
        kept = ("_specializations", "_traced", "_latest")
        return {name: value for name, value in self.__dict__.items() if name not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Start without a specialisation."""
        self._specializations: Cache[Specialization] = Cache()
        self._traced = self._specializations.values  # Dynamo reads these
        self._latest = None

    @property
    def latest(self) -> Specialization:
        """The specialisation that was called or traced last.

        Raises:
            SpecialisationError: there is none yet.
        """
        if self._latest is None:
            raise SpecialisationError(
                "nothing is compiled yet: call the module, or trace it with hd.trace(*args, tangents=V, ...)"
            )
        return self._latest

    @property
    def stages(self) -> dict[str, fx.GraphModule]:
        """Every stage of the latest specialisation by its name, the final graph last."""
        return self.latest.stages

    @property
    def code(self) -> str:
        """The final graph of the latest specialisation as Python source that runs on its own."""
        return inspection.code(self.latest.compiled.final)

    def print_readable(self, stage: str | None = None) -> None:
        """Print a stage of the latest specialisation (the final graph by default) as Python source."""
        inspection.print_readable(self._stage(stage))

    def report(self) -> inspection.Report:
        """Figures of the latest specialisation: node counts, what was pruned, how each operator is served."""
        return inspection.report(self.latest)

    def draw(self, path: str | os.PathLike[str], stage: str | None = None) -> None:
        """Write a picture (``.png``, ``.svg``, ``.dot``, ``.graphml``, ..) of a stage, the final graph by default."""
        inspection.draw(self._stage(stage), path)

    def _stage(self, name: str | None) -> fx.GraphModule:
        if name is None:
            return self.latest.compiled.final
        if name not in self.stages:
            raise ArgumentError(f"stage: expected one of {', '.join(self.stages)}, got {name!r}")
        return self.stages[name]


def compile(hd: HyperDualModule, **options: Any) -> HyperDualModule:
    """The same expansion, lowered by torch.compile to one program for each signature.

    Args:
        hd: a transformed model; it stays as it is, and shares the model with the result.
        options: for ``torch.compile``: ``mode``, ``backend``, ``options``.

    Returns:
        A :class:`HyperDualModule` that compiles each signature at its first call, layers that repeat once. Random
        operators draw other numbers than in eager mode unless ``torch._inductor.config.fallback_random`` is set, and
        dropout in place draws them in Inductor's own order even then.

    Raises:
        ArgumentError: ``hd`` is not a transformed model.
    """
    if not isinstance(hd, HyperDualModule):
        raise ArgumentError(f"hd: expected the result of fomoh_fx.transform, got {type(hd).__name__}")
    compiled = transform(
        hd.model,
        hd.loss,
        wrt=hd.wrt,
        second_order=hd.second_order,
        curvature=hd.curvature,
        first_order=hd.first_order,
    )
    compiled.lowering = partial(lower.inductor, **options)
    compiled.most_specializations = hd.most_specializations
    return compiled


def _reaches(program: Program, seeds: Sequence[int], outputs: Sequence[int]) -> bool:
    """Whether one of these outputs depends on one of these inputs."""
    results = [program.results[i] for i in outputs]
    varied = analyse(program.module.graph, [program.placeholders[i] for i in seeds], results).varied
    return any(result in varied for result in results)


def _refuse_fixed(program: Program, dims: list[dict[int, Any]]) -> None:
    """A dimension that was marked dynamic must not have been fixed by the model or by a rule."""
    for node, what in zip(program.placeholders, program.inputs, strict=True):
        for dim, kind in dims[what.index].items() if what.kind == "argument" else ():
            size = node.meta["val"].shape[dim]
            fixed = size if isinstance(size, int) else size.node.maybe_as_int()
            if fixed is not None and must_vary(kind):
                raise SpecialisationError(
                    f"dynamic_shapes: dimension {dim} of {what.name} is fixed to {fixed} by the model or a rule"
                    f"{_fixed_at(size)}. Leave it static, or let it be fixed where that has to be (Dim.AUTO)"
                )


def _fixed_at(size: Any) -> str:
    """The line that has compared a size with the number that it is now taken for, where PyTorch knows."""
    if isinstance(size, int):
        return ""
    about = [g for g in size.node.shape_env.guards if g.expr.is_Equality and size.node._expr in g.expr.free_symbols]
    frame = about[0].sloc.framework_loc if about else None
    return "" if frame is None else f" (at {Path(frame.filename).name}:{frame.lineno}, {frame.line})"


_UNTRACED = (
    "torch.compile(hd) met a signature that was not traced: call hd once, or hd.trace(...), with arguments of these "
    "shapes first, or use fomoh_fx.compile(hd), which traces by itself, also where the values of "
    "tensors decide a branch or a shape"
)


@torch.compiler.disable(reason=_UNTRACED)
def _refuse_untraced() -> HyperDual:
    raise SpecialisationError(_UNTRACED)


def _names(wrt: Any) -> tuple[str, ...]:
    names = tuple(wrt) if isinstance(wrt, Iterable) else (wrt,)
    if not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"wrt: expected 'parameters', 'inputs', or names and patterns of parameters, got {wrt!r}")
    return names


def _check_call(model: Any, loss: Any, call: Call) -> None:
    """Whether the model and the loss take these arguments, where they tell."""
    _check_binding("args: the model", model, call.args, call.kwargs)
    if loss is not None:
        _check_binding("targets: the loss", loss, (None, *call.targets), {})


def _check_binding(label: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{label} cannot be called like this: {error}; it takes {signature}") from None


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def argument_names(model: Any, call: Call) -> list[str]:
    """A readable name for every tensor leaf: the argument's name, with the path inside it."""
    function = model.forward if isinstance(model, nn.Module) else model
    paths, _ = pytree.tree_flatten_with_path(opened((call.args, call.kwargs, call.targets)))
    return [_readable(function, path) for path, leaf in paths if isinstance(leaf, Tensor)]


def _readable(function: Callable[..., Any], path: Any) -> str:
    where, *rest = path
    part = ("args", "kwargs", "targets")[where.idx]
    first = rest[0]
    tail = "".join(f"_{getattr(k, 'idx', getattr(k, 'key', getattr(k, 'name', k)))}" for k in rest[1:])
    if part == "kwargs":
        return f"{first.key}{tail}"
    if part == "targets":
        return f"target_{first.idx}{tail}"
    try:
        parameters = list(inspect.signature(function).parameters.values())
        parameter = parameters[min(first.idx, len(parameters) - 1)]
        variadic = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        name = f"{parameter.name}_{first.idx}" if variadic else parameter.name
    except (TypeError, ValueError):
        name = f"argument_{first.idx}"
    return name + tail

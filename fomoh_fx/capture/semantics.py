"""What plain tracing loses, and reverse mode keeps: detach, no_grad, custom autograd Functions, captured tensors.

Tracing records values, and a value does not say that its derivative was stopped or replaced. This mode is active
while the model runs under a frontend and records those facts as the operators of
:mod:`fomoh_fx.operators`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo import _trace_wrapped_higher_order_op as scalar_indexing
from torch._functorch import eager_transforms
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributions.dirichlet import _Dirichlet
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fomoh_fx.capture.aliases import Aliases, is_differentiable, is_view, stopped
from fomoh_fx.capture.checkpoints import checkpoints_saved
from fomoh_fx.capture.constants import KEEP_STATISTICS, argument
from fomoh_fx.capture.constructors import class_of, index_of_elements
from fomoh_fx.capture.control_flow import higher_order_operators
from fomoh_fx.capture.entrances import entrances_noticed
from fomoh_fx.capture.untraceable import dropout, traceable
from fomoh_fx.custom_functions import FunctionCall, apply_of_library, functions_called, of_library
from fomoh_fx.errors import CaptureError, FomohError, UnsupportedOpError
from fomoh_fx.functional_forms import apart, changed_arguments, changes_arguments, functional_form, named
from fomoh_fx.passes.data_sizes import DECIDED_BY_DATA
from fomoh_fx.templates import Template, with_known
from fomoh_fx.triton_kernels import LAUNCH, launch

ops = torch.ops.fomoh_fx


_UNDER_TRANSFORMS = torch.autograd.function.custom_function_call


def _call_under_transforms(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    batched = any(torch._C._functorch.is_batchedtensor(t) for t in Template.of(args)[1])
    if batched and function.generate_vmap_rule:
        raise UnsupportedOpError(
            f"the custom autograd Function {function.__name__} is called under torch.vmap, where its calls cannot be "
            "recorded: call it on the whole batch, or write its value with torch functions"
        )
    return _UNDER_TRANSFORMS(function, *args, **kwargs)


_FORWARD_JACOBIAN = eager_transforms.jacfwd


def _noted(kind: type[Exception], made: list[Exception]) -> Any:
    """Every error of this kind that is made is added to the list."""
    initialise = kind.__init__

    def noted(error: Exception, *args: Any, **kwargs: Any) -> None:
        initialise(error, *args, **kwargs)
        made.append(error)

    return patch.object(kind, "__init__", noted)


def _outer_jacobian(function: Callable[..., Any], argnums: Any = 0) -> Callable[..., Any]:
    """The outer one of ``torch.func.hessian``: under vmap PyTorch traces reverse mode over reverse mode only."""

    def jacobian(*args: Any) -> Any:
        transforms = torch._C._functorch.get_interpreter_stack() or ()
        is_batched = any(t.key() == torch._C._functorch.TransformType.Vmap for t in transforms)
        of = eager_transforms.jacrev if is_batched else _FORWARD_JACOBIAN
        return of(function, argnums)(*args)

    return jacobian


def _refuse_linearize(*_: Any, **__: Any) -> Any:
    raise CaptureError(
        "model: calls torch.func.linearize, which computes the values at its point as constants, so that their "
        "derivatives would be lost; call torch.func.jvp, which computes the same"
    )


_STOPS = {torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
_COPIES = {torch.Tensor.__deepcopy__, torch.nn.Parameter.__deepcopy__}
_GRAD_MODE = {torch._C._set_grad_enabled}
_IS_LEAF = torch.Tensor.is_leaf.__get__  # type: ignore[attr-defined]
#: Outside of PyTorch, where a tensor without data fails in its own way.
_READ_NUMBERS = {
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__array__,
    torch.Tensor.__format__,
}
_READ_MEMORY = {torch.Tensor.data_ptr, torch.Tensor.__dlpack__}  # of which one without data may give any
_GRADIENTS = {torch.Tensor.grad.__get__, torch.Tensor._grad.__get__}  # type: ignore[attr-defined,union-attr]
_INDEX = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_SET_LEARNING = {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_ASK_FOR_GRADIENT = {torch.Tensor.requires_grad.__get__, _IS_LEAF}  # type: ignore[attr-defined]
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


def is_real(tensor: Tensor) -> bool:
    """A tensor with data of its own that is met while the frontend runs the model on fake ones."""
    if type(tensor) not in _PLAIN or tensor.is_meta:  # a fake tensor is one without data inside
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_size(x: Any) -> bool:
    """A tree map would make a plain tuple of it, and ``tensor.new(tuple)`` means values, not a shape."""
    return isinstance(x, torch.Size)


def mutates(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (
        name in ("__setitem__", "__set__")
        or (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__"))
    )


class ReverseModeSemantics(TorchFunctionMode):
    """Active while the model runs under a frontend; see the module's text.

    Attributes:
        foreign: tensors that the model uses without owning them (captured by a closure, a plain attribute).
        before: those of them that the run changes in place, and copies from before.
        made: what torch functions have returned.
        names: of tensors from before the run, and of what stands for them, by identity.
        leaves: inputs with tangents, which are no leaves while they are captured, so that the model may change them.
        refusal: what tells the frontend that the model cannot be captured, which the model itself may catch.
        undecided: errors because of a number that is not known, which the model itself may catch, or PyTorch.
        has_denied: whether the model has asked a tensor for a gradient of it, and been told that there is none.
        asks_for_offset: whether the model has asked where in its storage a tensor begins.
        learning: what requires a gradient or does not, since the model has said so, and whether it does.
    """

    def __init__(
        self,
        known: Mapping[int, Tensor],
        before: list[tuple[Tensor, Tensor]],
        leaves: Sequence[Tensor] = (),
        names: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.known, self.before, self.leaves, self.names = known, before, leaves, names
        self.foreign: dict[int, Tensor] = {}
        self.made: list[weakref.ref[Tensor]] = []
        self.has_denied = False
        self.refusal: Exception | None = None
        self.undecided: list[Exception] = []
        self.asks_for_offset = False
        self.learning: dict[int, tuple[Tensor, bool]] = {}
        self._aliases = Aliases(self._remember)
        self._shared: list[list[tuple[weakref.ref[Tensor], int]]] = []  # of one memory after x.data = y, with versions
        self._moved: list[weakref.ref[Tensor]] = []  # x after x.data = y, which its earlier views are no part of
        self._later_views: list[weakref.ref[Tensor]] = []  # views of those since then
        self._patches = ExitStack()

    def __enter__(self) -> ReverseModeSemantics:
        self._patches.enter_context(functions_called(self._record_function))
        self._patches.enter_context(higher_order_operators())
        self._patches.enter_context(checkpoints_saved())
        self._patches.enter_context(entrances_noticed(lambda tensor: self._used(self.own(tensor))))
        # PyTorch's own Function for x[i] under vmap, as masks of attention are made: an index, and its derivative
        self._patches.enter_context(patch.object(scalar_indexing, "mod_index", scalar_indexing.ModIndex.forward))
        self._patches.enter_context(
            patch.object(torch.autograd.function, "custom_function_call", _call_under_transforms)
        )
        self._patches.enter_context(patch.object(eager_transforms, "jacfwd", _outer_jacobian))
        self._patches.enter_context(patch.object(eager_transforms, "lazy_dynamo_disallow", _refuse_linearize))
        self._patches.enter_context(_noted(GuardOnDataDependentSymNode, self.undecided))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._patches.close()
        self._aliases.clear()
        self._shared.clear()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func not in _GRAD_MODE:  # no_grad without versions
            with torch.inference_mode(False), torch.no_grad():
                return self.__torch_function__(func, types, args, kwargs)
        self._aliases.follow()  # a custom Function may have changed something since the last call
        try:
            result = self._call(func, args, kwargs or {})
        except Exception as error:
            if isinstance(error, (*DECIDED_BY_DATA, FomohError)) or func in _READ_NUMBERS:
                self.refusal = error
            raise
        self._aliases.follow()
        results = result if isinstance(result, (tuple, list)) else (result,)
        if self._shared:
            self._refuse_shared()
        if self._moved:
            self._later_views += [weakref.ref(t) for t in results if isinstance(t, Tensor) and self._is_moved(t._base)]
        if not mutates(func):  # which returns what it was given
            self.made += [weakref.ref(t) for t in results if isinstance(t, Tensor) and not is_real(t)]
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if func in _GRAD_MODE:
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self.own, (args, kwargs), is_leaf=_is_size)
        self.has_denied |= func in _ASK_FOR_GRADIENT and not args[0].requires_grad
        self.asks_for_offset |= func == torch.Tensor.storage_offset
        if func is torch.Tensor.type:
            args, kwargs = tuple(map(class_of, args)), {name: class_of(x) for name, x in kwargs.items()}
        if func in _GRADIENTS and id(args[0]) in self.names:
            name = self.names[id(args[0])].removeprefix("model.")
            raise CaptureError(
                f"model: reads the gradient (.grad) of {name} while it runs, and a graph has none of it; pass it as an "
                "argument, or keep it in a buffer"
            )
        if func == _IS_LEAF and any(args[0] is leaf for leaf in self.leaves):
            return True
        if func in _READ_MEMORY and not is_real(args[0]):
            raise CaptureError(
                f"model: reads the memory of a tensor (.{func.__name__}()) while it runs, and a graph has none; use "
                "torch functions, or make an operator of it (torch.library.custom_op)"
            )
        if func in _ASK_FOR_GRADIENT and func != _IS_LEAF and id(args[0]) in self.learning:
            return self.learning[id(args[0])][1]
        if func in _SET_LEARNING and id(args[0]) in self.names:
            self._set_learning(args[0], bool((*args[1:], *kwargs.values(), True)[0]))
            return None if func != torch.Tensor.requires_grad_ else args[0]
        if func in _INDEX:
            args = (args[0], index_of_elements(args[1]), *args[2:])
        func = traceable(func, args)
        if func == torch.Tensor.requires_grad.__set__ and args[0].requires_grad and args[1]:  # type: ignore[attr-defined]
            return None  # which only leaves allow, and here an input with a tangent is none
        if getattr(func, "__name__", "").startswith("_foreach_") and mutates(func):
            return self._change_each(func, args, kwargs)
        if func is LAUNCH:
            for target, value in launch(**kwargs):
                self._assign(target, value)
            return None
        if changes_arguments(called := _overload(func)):
            return self._change_arguments(called, args, kwargs)
        if mutates(func) and args and isinstance(args[0], Tensor):
            self._remember(args[0])
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            return self._set_data(*args)
        if func in _COPIES:  # as of a leaf, which is another leaf
            with torch.no_grad():
                return args[1].setdefault(id(args[0]), stopped(args[0]).requires_grad_(args[0].requires_grad))
        if func in _STOPS:
            return self._aliases.of(args[0])
        if func in _RENORMALISE and (bound := _bound(func, args, kwargs)).arguments["max_norm"] is not None:
            return self._renormalised(func, bound)
        if func is torch.Tensor.detach_:
            return args[0].copy_(ops.stop_gradient.default(args[0]))
        if func is torch.Tensor.backward and not kwargs.get("create_graph"):
            raise CaptureError(
                "model: calls .backward() while it runs, which has no place in a graph; take the gradients by "
                "torch.autograd.grad, whose results have no derivative either without create_graph=True"
            )
        if func is torch.autograd.grad and not kwargs["create_graph"]:
            return pytree.tree_map_only(Tensor, stopped, func(*args, **kwargs))
        if self.learning:
            changed, given = (args[:1], args[1:]) if mutates(func) else ((), args)
            given, kwargs = pytree.tree_map_only(Tensor, self._used, (given, kwargs), is_leaf=_is_size)
            args = (*changed, *given)
        if torch.is_grad_enabled() or func in _ATTRIBUTES:
            result = func(*args, **kwargs)
        else:
            result = self._without_gradient(func, args, kwargs)
        if func in KEEP_STATISTICS:
            for statistic in _statistics(func, args, kwargs):
                self._aliases.note(statistic)
        return result

    def _record_function(self, function: type[torch.autograd.Function], *args: Any) -> Any:
        if function is torch.utils.checkpoint.CheckpointFunction:  # recomputation changes memory, not derivatives
            run, _preserve_random_state, *inputs = args
            return run(*inputs)
        if function is _Dirichlet:  # whose operator has a rule
            return torch._sample_dirichlet(*args)
        if of_library(function):  # the operator itself is recorded
            return apply_of_library(function, *args)
        template, tensors = Template.of(with_known(pytree.tree_map_only(Tensor, self.own, args)))
        given = [weakref.ref(x) if is_real(x) else None for x in template.tensors_of(args)]
        return FunctionCall(function, template, given).results_of(tensors)

    def own(self, tensor: Tensor) -> Tensor:
        """What stands for the tensor in the run: another one for a foreign tensor that is known, itself otherwise."""
        if self._moved and self._is_moved(tensor._base) and not any(ref() is tensor for ref in self._later_views):
            raise UnsupportedOpError(
                "the model assigns x.data = y, and then uses a view of x from before, which has the memory that x had: "
                "a graph has none; make it a copy (.clone()) there"
            )
        if id(tensor) in self.known:
            return self.known[id(tensor)]
        if is_real(tensor):
            self.foreign[id(tensor)] = tensor
        return tensor

    def _set_learning(self, tensor: Tensor, learns: bool) -> None:
        """What the model says of an input; an argument that has no gradient gets one, for torch.autograd.grad."""
        self.learning[id(tensor)] = tensor, learns
        is_given = self.names[id(tensor)].startswith(argument(""))
        if learns and is_given and not tensor.requires_grad and not isinstance(tensor, FunctionalTensor):
            tensor.requires_grad_()  # export refuses it

    def _used(self, tensor: Tensor) -> Tensor:
        """What a function is given: without derivative, what the model has told not to require a gradient."""
        _, learns = self.learning.get(id(tensor), (tensor, True))
        return tensor if learns else self._aliases.of(tensor)  # which has its memory

    def source_of(self, tensor: Tensor) -> Tensor | None:
        """For ``x.detach()`` or ``x.data``, x."""
        return self._aliases.source(tensor)

    def _remember(self, tensor: Tensor) -> None:
        """Capture changes no state: a foreign tensor that the model changes in place is restored afterwards."""
        if is_real(tensor) and not any(tensor is known for known, _ in self.before):
            with unset_fake_temporarily(), disable_proxy_modes_tracing():
                self.before.append((tensor, tensor.detach().clone()))

    def _change_each(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """In place on a list: one after the other, so that each is noticed."""
        op = getattr(torch.ops.aten, func.__name__[:-1])
        for i, target in enumerate(args[0]):
            given = [[x[i]] if isinstance(x, (list, tuple)) else x for x in args]
            others = {name: [x[i]] if isinstance(x, (list, tuple)) else x for name, x in kwargs.items()}
            (value,) = op(*given, **others)
            self._call(torch.Tensor.copy_, (target, value), {})
            self._aliases.follow()

    def _without_gradient(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Under no_grad: a result has no derivative, and what is changed in place goes on with the one that it had.

        What is given back is itself, as ``x.contiguous()`` may be.
        """
        if func in _DROPOUTS and kwargs.get("training") is False:
            return args[0]
        before = [(target, target.clone()) for target in _changed(func, args, kwargs) if is_differentiable(target)]
        result = func(*args, **kwargs)
        for target, old in before:
            target.copy_(ops.with_value.default(old, target))
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs), is_leaf=_is_size)}

        def without(tensor: Tensor) -> Tensor:
            if id(tensor) in given or not is_differentiable(tensor):
                return tensor
            return self._aliases.of(tensor) if is_view(tensor) else stopped(tensor)

        return pytree.tree_map_only(Tensor, without, result, is_leaf=_is_size)

    def _change_arguments(self, op: OpOverload, args: tuple[Any, ...], kwargs: Any) -> Any:
        """An operator of another library that changes its arguments: its functional form, and copies of the results."""
        returned, new = apart(op, functional_form(op)(*args, **kwargs))
        given = named(op, args, kwargs)
        for written, value in zip(changed_arguments(op), new, strict=True):
            for target, result in zip(pytree.tree_leaves(given[written.name]), pytree.tree_leaves(value), strict=True):
                self._assign(target, result)
        fresh = iter(returned)
        by_alias = {tuple(a.alias_info.before_set): given[a.name] for a in changed_arguments(op)}
        results = [
            next(fresh) if r.alias_info is None else by_alias[tuple(r.alias_info.before_set)]
            for r in op._schema.returns
        ]
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def _assign(self, target: Tensor, value: Tensor) -> None:
        """Give a tensor the value in place; its derivative goes on under no_grad."""
        self._remember(target)
        if not torch.is_grad_enabled() and is_differentiable(target):
            value = ops.with_value.default(target.clone(), value)
        target.copy_(value)

    def _set_data(self, target: Tensor, value: Tensor) -> None:
        """x.data = y: x keeps its derivative and has the value of y. They share memory then, and a graph has none."""
        if (target.shape, target.dtype, target.device) != (value.shape, value.dtype, value.device):
            raise UnsupportedOpError(
                f"the model assigns to the data of a tensor of shape {tuple(target.shape)} and {target.dtype} a tensor "
                f"of shape {tuple(value.shape)} and {value.dtype}: make a new tensor instead"
            )
        if target._base is not None:
            raise UnsupportedOpError("the model assigns to the data of a view: make a new tensor instead")
        if _strides(target) != _strides(value):
            raise UnsupportedOpError(
                f"the model assigns to the data of a tensor with strides {target.stride()} a tensor with strides "
                f"{value.stride()}, which the graph would not keep: assign one laid out alike (.contiguous()), or make "
                "a new tensor instead"
            )
        if self._aliases.source(value) is target or value._base is target:  # x.data = x.data
            return
        left = self._aliases.leave(target)  # x.detach() from before has the memory that x had
        with torch.no_grad():
            self._assign(target, value)
        self._later_views = [
            ref for ref in self._later_views if (view := ref()) is not None and view._base is not target
        ]
        self._moved.append(weakref.ref(target))
        self._share(target, value, left)

    def _owner(self, tensor: Tensor) -> Tensor:
        """The tensor whose memory it is, where it is a view or without derivative."""
        while (source := self._aliases.source(tensor)) is not None:
            tensor = source
        return tensor if tensor._base is None else self._owner(tensor._base)

    def _is_moved(self, x: Tensor | None) -> bool:
        return x is not None and any(ref() is x for ref in self._moved)

    def _share(self, target: Tensor, value: Tensor, left: Sequence[Tensor]) -> None:
        """From here on the target lies where the value does, and no longer where it did, with what is left there."""
        groups = [[(ref, version) for ref, version in group if ref() is not target] for group in self._shared]
        if left:
            groups.append([(weakref.ref(x), x._version) for x in left])
        owner = self._owner(value)
        joined = next((group for group in groups if any(ref() is owner for ref, _ in group)), [])
        joined += [(weakref.ref(x), x._version) for x in (target, owner, value)]
        self._shared = [group for group in groups if group is not joined] + [joined]

    def _refuse_shared(self) -> None:
        for group in self._shared:
            tensors = {id(x): (x, version) for ref, version in group if (x := ref()) is not None}
            if len(tensors) > 1 and any(x._version != version for x, version in tensors.values()):
                raise UnsupportedOpError(
                    "the model assigns x.data = y, and then changes in place one of two tensors that share memory: x "
                    "and y, or what was detached from x before; a graph has no memory: assign a copy (y.clone())"
                )

    @staticmethod
    def _renormalised(func: Any, bound: inspect.BoundArguments) -> Any:
        """An embedding with max_norm first changes the rows that it uses in its weight, without derivative."""
        given = bound.arguments
        weight = given["weight"]
        value = ops.stop_gradient.default(weight)
        torch.embedding_renorm_(value, given["input"].contiguous(), given["max_norm"], given["norm_type"])
        with torch.no_grad():
            weight.copy_(ops.with_value.default(weight.clone(), value))
        given["max_norm"] = None
        return func(*bound.args, **bound.kwargs)


def _overload(func: Any) -> Any:
    """The only overload of a packet, which a user may call instead."""
    if isinstance(func, OpOverloadPacket) and len(func.overloads()) == 1:
        return getattr(func, func.overloads()[0])
    return func


_RENORMALISE = {torch.nn.functional.embedding, torch.nn.functional.embedding_bag}


def _bound(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


_F = torch.nn.functional
#: What they return in evaluation is what they are given.
_DROPOUTS = {_F.dropout, dropout, _F.dropout2d, _F.dropout3d, _F.alpha_dropout, _F.feature_alpha_dropout}

#: They are there, whether gradients are enabled or not.
_ATTRIBUTES = {torch.Tensor.grad.__get__, torch.Tensor._base.__get__}  # type: ignore[attr-defined,union-attr]


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the call says it changes: by the function's name, ``out=`` or ``inplace=True``."""
    is_first = mutates(func) or kwargs.get("inplace") is True
    given = args[:1] if is_first else kwargs.get("out")
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]


def _statistics(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The running statistics that the function may have changed: their versions do not tell."""
    first = 1 if func in (_F.batch_norm, _F.instance_norm, torch.batch_norm_update_stats) else 3
    given = (*args[first : first + 2], kwargs.get("running_mean"), kwargs.get("running_var"))
    return [x for x in given if isinstance(x, Tensor)]


def _strides(x: Tensor) -> list[int]:
    """Where it lies in memory: an only element has no next one."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]

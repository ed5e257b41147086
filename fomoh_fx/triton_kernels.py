"""Triton kernels in a model as operators: one for each kernel, ``fomoh_fx_functions::name(inputs, call)``.

Its results are the new values of the tensors that the kernel writes. PyTorch finds out which those are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    TraceableTritonKernelWrapper,
    get_mutated_tensors,
    kernel_side_table,
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)
from torch._ops import OpOverload

from fomoh_fx.custom_functions import CALLS, Argument, operator_of, refuse_sizes
from fomoh_fx.errors import UnsupportedOpError
from fomoh_fx.functional_forms import without_backward
from fomoh_fx.templates import Template

LAUNCH = triton_kernel_wrapper_mutation


def is_kernel(value: Any) -> bool:
    """Whether the value is a Triton kernel: jitted, autotuned, or wrapped for PyTorch."""
    return isinstance(value, TraceableTritonKernelWrapper) or (hasattr(value, "arg_names") and hasattr(value, "fn"))


def function_of(kernel: Any) -> Callable[..., Any]:
    """The Python function that a kernel was made from, which the wrappers around it share."""
    if isinstance(kernel, TraceableTritonKernelWrapper):
        return function_of(kernel.kernel)
    return function_of(kernel.fn) if hasattr(kernel, "fn") else kernel


def operator_of_kernel(kernel: Any) -> OpOverload:
    """The operator that stands for launches of the kernel."""
    return operator_of(function_of(kernel))


def launch(**given: Any) -> list[tuple[Tensor, Tensor]]:
    """Record a launch: the tensors that it writes, and their new values."""
    record = KernelCall(given)
    results = operator_of_kernel(record.kernel)(record.tensors, record.number)
    return [(given["kwargs"][name], value) for name, value in zip(record.written, results, strict=True)]


class KernelCall:
    """One launch of a Triton kernel, with PyTorch's description of it.

    Attributes:
        written: the names of the tensors that the kernel writes.
        arguments, results: the kernel's arguments, in its own order, and its results without their tensors.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        kernel: Any = kernel_side_table.get_kernel(given["kernel_idx"])
        self.kernel = kernel
        constants = kernel_side_table.get_constant_args(given["constant_args_idx"])
        named = {**constants, **given["kwargs"]}
        refuse_sizes(self.name, (named, given["grid"]))
        self.names = [name for name in self.kernel.arg_names if name in named]
        self.arguments, self.tensors = Template.of(tuple(named[name] for name in self.names))
        described = {
            key: given[key] for key in ("kernel_idx", "constant_args_idx", "kwargs", "tma_descriptor_metadata")
        }
        self.written = get_mutated_tensors(**described)
        values = [named[name] for name in self.written]
        self.results = Template.of(values[0] if len(values) == 1 else tuple(values))[0]
        self.number = len(CALLS)
        CALLS[self.number] = self

    @property
    def name(self) -> str:
        return function_of(self.kernel).__name__

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The new values of the tensors that the kernel writes."""
        values = dict(zip(self.names, self.arguments.fill(tensors), strict=True))
        arguments = {name: values.get(name, value) for name, value in self.given["kwargs"].items()}
        described = {**self.given, "kwargs": arguments}
        out = triton_kernel_wrapper_functional(**described, tensors_to_clone=self.written)
        return [out[name] for name in self.written]

    def infer(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same without data."""
        values = dict(zip(self.names, self.arguments.fill(tensors), strict=True))
        return [torch.empty_like(values[name]) for name in self.written]

    def connect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same under autograd, which knows no derivative."""
        with torch._C._AutoDispatchBelowAutograd():
            results = operator_of_kernel(self.kernel)(list(tensors), self.number)
        return without_backward(results, tensors, self.name)

    def check_derivable(self) -> None:
        """Refuse a kernel without a rule."""
        raise UnsupportedOpError(f"no rule, and nobody knows the derivative of the Triton kernel {self.name}")

    @cached_property
    def operator(self) -> KernelOperator:
        return KernelOperator(self)


class KernelOperator:
    """A launch as the kernel's rule sees it: called on the kernel's arguments it gives what the kernel writes."""

    def __init__(self, record: KernelCall) -> None:
        self.record = record

    def __call__(self, *args: Any) -> Any:
        template, tensors = Template.of(args)
        if not template.has_leaves_of(self.record.arguments):
            raise UnsupportedOpError("a kernel can be launched again on other tensors, not with other numbers")
        return self.record.results.fill(operator_of_kernel(self.record.kernel)(tensors, self.record.number))

    @property
    def overload(self) -> OpOverload:
        """What stands in a graph."""
        return operator_of_kernel(self.record.kernel)

    def __str__(self) -> str:
        return self.record.name

    __repr__ = __str__

    @property
    def arguments(self) -> list[Argument]:
        """The kernel's arguments."""
        return [Argument(name) for name in self.record.names]

"""What a model has beside its data that goes on whenever it is asked: generators of random numbers, iterators."""

from __future__ import annotations

import inspect
import pickle
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import BuiltinMethodType, FunctionType, GeneratorType, MethodType
from typing import Any

from torch import nn

from fomoh_fx.capture.state import containers, written
from fomoh_fx.containers import children, is_a_users, is_record
from fomoh_fx.errors import CaptureError

_PLAIN = (bool, int, float, complex, str, bytes, range, type(None))
_MOST = 16  # elements of a list that tell where an iterator is


class Advancing:
    """A generator or an iterator, with a name for it and where it was."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.before = name, value, _state_of(value)

    def has_advanced(self) -> bool:
        """Whether it has been asked since then."""
        return _state_of(self.value) != self.before

    def refusal(self) -> CaptureError:
        """Of a model that has asked it."""
        is_iterator = isinstance(self.value, Iterator)
        does = "takes the next value of" if is_iterator else "draws from the random numbers of"
        advice = "Pass the value as an argument" if is_iterator else "Draw with torch, or pass them as arguments"
        return CaptureError(
            f"model: {does} {self.name} while it runs, and the graph would have the first call's for ever. {advice}"
        )


def advancing(models: Sequence[Any], arguments: Sequence[Any] = ()) -> list[Advancing]:
    """The generators and iterators among arguments, in attributes of modules and in variables of their code."""
    places = {f"its argument {value!r}": value for value in arguments if not isinstance(value, _PLAIN)}
    seen: set[int] = set()
    for part in [p for model in models for p in (model.modules() if isinstance(model, nn.Module) else (model,))]:
        kind = type(part).__name__
        if isinstance(part, nn.Module):
            places |= {f"{kind}.{written((name,))}": value for name, value in vars(part).items()}
            for keys, container in containers(part):
                places |= {f"{kind}.{written((*keys, k))}": v for k, v in (children(container) or {}).items()}
        function = inspect.unwrap(part.forward if isinstance(part, nn.Module) else part)
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType) and is_a_users(function.__module__) and id(function) not in seen:
            seen.add(id(function))
            places |= {f"{function.__module__}.{name}": value for name, value in function.__globals__.items()}
            places |= inspect.getclosurevars(function).nonlocals
    found = [pair for name, value in places.items() for pair in _behind(name, value)]
    return [Advancing(name, value) for name, value in found if _state_of(value) is not None]


def _behind(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The value, what it is a method of, and the variables that it has from where it was defined."""
    yield name, value
    if isinstance(value, (MethodType, BuiltinMethodType)) and not _is_shared(value):
        yield name, value.__self__
    if isinstance(value, FunctionType) and value.__closure__:
        for variable, content in inspect.getclosurevars(value).nonlocals.items():
            yield f"{name} ({variable})", content


def _is_shared(method: Any) -> bool:
    """Whether it draws from Python's or NumPy's own generator, whose draws may not matter."""
    return any(method == getattr(module, method.__name__, None) for module in (random, sys.modules.get("numpy.random")))


def _state_of(value: Any) -> Any:
    """Where a generator or an iterator is, None for anything else."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return pickle.dumps(value.getstate())
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return pickle.dumps(value.get_state())
    return _position(value) if isinstance(value, Iterator) and not is_record(value) else None


def _position(value: Any, depth: int = 8) -> Any:
    """Something that is another after a step: of a generator its frame, of an iterator how to make one like it."""
    if type(value) in _PLAIN:
        return repr(value)
    parts: Iterable[Any] = ()
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        parts = (None,) if frame is None else (frame.f_lasti, *frame.f_locals.values())
    elif isinstance(value, (tuple, list)):
        parts = (len(value), *value[:_MOST])
    elif isinstance(value, Iterator):
        parts = vars(value).values() if hasattr(value, "__dict__") else _recipe(value)
    if not parts:
        return id(value)
    return [_position(part, depth - 1) for part in parts] if depth else type(value)


def _recipe(iterator: Iterator[Any]) -> tuple[Any, ...]:
    """How to make one like it, which says where it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on
        try:
            return tuple(iterator.__reduce__())
        except Exception:  # not every one tells
            return (repr(iterator),)

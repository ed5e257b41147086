"""What the frontends said of a model that they refused, each thing once, with the user's line that it was at."""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fomoh_fx.passes.provenance import source_line

#: What to do, by a part of what a frontend says.
_ADVICE = {
    ".numpy() is not supported": "; a graph has no NumPy arrays: compute with torch, or before the call and pass the "
    "result as an argument",
}


@dataclass(frozen=True)
class Reason:
    """One frontend's: the error's first line, and where in the user's code it was raised (may be empty)."""

    frontend: str
    message: str
    where: str

    @classmethod
    def of(cls, frontend: str, error: Exception) -> Reason:
        """What a frontend raised."""
        message = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        advice = next((advice for part, advice in _ADVICE.items() if part in message), "")
        where = source_line("".join(traceback.format_tb(error.__traceback__)))
        return cls(frontend, f"{type(error).__name__}: {message}{advice}", where)

    def __str__(self) -> str:
        return f"{self.frontend}: {self.text}"

    @property
    def text(self) -> str:
        """Without the frontend."""
        return f"{self.message} (at {self.where})" if self.where else self.message


def each_once(reasons: Sequence[Reason]) -> list[str]:
    """A line for each message, with the frontends that gave it, unless all of them did."""
    by_message: dict[str, list[Reason]] = defaultdict(list)
    for reason in reasons:
        by_message[reason.message].append(reason)
    lines = []
    for same in by_message.values():
        text = next((reason for reason in same if reason.where), same[0]).text
        lines.append(text if len(by_message) == 1 else f"{', '.join(reason.frontend for reason in same)}: {text}")
    return lines


def without_locals(error: BaseException) -> BaseException:
    """The error as a cause to show: its traceback no longer keeps tensors and modules alive."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            todo += [one.__cause__, one.__context__]
    return error

"""Each task in a forked process of its own, so that a crash, a hang or a changed global state stays there."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")


def isolated(
    function: Callable[[Task], Any], tasks: Iterable[Task], jobs: int, timeout: float
) -> Iterator[tuple[Task, Any]]:
    """Every task with its result, as they finish; a string says what happened to a process that gave none."""
    context = multiprocessing.get_context("fork")
    waiting = iter(tasks)
    running: dict[Any, tuple[Task, Any, float]] = {}
    while True:
        while len(running) < jobs and (task := next(waiting, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(function, task, sender))
            process.start()
            sender.close()
            running[receiver] = task, process, time.monotonic() + timeout
        if not running:
            return
        ready = wait(list(running), timeout=1.0)
        for receiver in [r for r, (_, _, end) in running.items() if r in ready or time.monotonic() > end]:
            task, process, _ = running.pop(receiver)
            yield task, _result(receiver, process, receiver in ready, timeout)


def _run(function: Callable[[Task], Any], task: Task, sender: Connection) -> None:
    try:
        sender.send(function(task))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}"[:300])


def _result(receiver: Connection, process: Any, ready: bool, timeout: float) -> Any:
    try:
        return receiver.recv() if ready else f"no answer within {timeout:.0f} s"
    except EOFError:
        process.join()
        return f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()

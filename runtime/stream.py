"""One request's steps on their way from the engine's thread to whoever listens, in threads or in an event loop.

Whoever listens is ended when the request is: every reader, however many there are and however often they begin anew.
"""

import asyncio
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from motrt.errors import EngineClosedError
from motrt.runtime.decoding import Row, Step

# How a request ends beside what ``Step.finish`` knows.
CANCELLED, DEADLINE = "cancelled", "deadline"

_END = object()


class Stream:
    """One request's steps, as they come. Iterate over it, or ``async for`` over ``events``; ``cancel`` ends it early.

    Each step goes to one reader.

    Attributes:
        number: of the request, counted by the engine.
        finish: how it ended; None while it goes on.
        error: what ended it, where something went wrong.
        rest: text that was held back when its time ended: half a character, or bytes that others might have followed.
        admitted: when it left the queue, by the monotonic clock; None while it waits.
    """

    def __init__(self, number: int, row: Row, priority: int, deadline: float | None) -> None:
        self.number, self.row, self.priority, self.deadline = number, row, priority, deadline
        self.finish: str | None = None
        self.error: BaseException | None = None
        self.rest = ""
        self.started = time.monotonic()
        self.admitted: float | None = None
        self.last_token: float | None = None
        self._is_cancelled = False
        self._process = os.getpid()
        self._ended = threading.Event()
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wakes: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    # What callers do.

    def cancel(self) -> None:
        """Let go of the request: its row is free before the next step. A request that has ended stays as it is."""
        self._is_cancelled = True

    def __iter__(self) -> Iterator[Step]:
        """Each step as it comes.

        Raises:
            MotrtError: what ended the request, where something went wrong; also in a process that was forked off the engine's.
        """
        try:
            while (step := self._next(waits=True)) is not _END:
                yield step
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error

    async def events(self) -> AsyncIterator[Step]:
        """The same in an event loop: nothing blocks it."""
        wake = (asyncio.get_running_loop(), asyncio.Event())
        self._wakes.append(wake)
        try:
            while True:
                try:
                    step = self._next(waits=False)
                except queue.Empty:
                    await wake[1].wait()
                    wake[1].clear()
                    continue
                if step is _END:
                    break
                yield step
        finally:
            self._wakes.remove(wake)
            self.cancel()
        if self.error is not None:
            raise self.error

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the request has ended within so long."""
        refuse_another_process(self._process)
        return self._ended.wait(seconds)

    def _next(self, waits: bool) -> Any:
        refuse_another_process(self._process)
        step = self._steps.get(waits)
        if step is _END:
            self._steps.put(_END)  # for the next reader
        return step

    # What the engine does.

    @property
    def is_unwanted(self) -> str | None:
        """Why the request should not go on; None where it should."""
        if self._is_cancelled:
            return CANCELLED
        return DEADLINE if self.deadline is not None and time.monotonic() >= self.deadline else None

    def give(self, step: Step) -> None:
        self._put(step)

    def end(self, finish: str, error: BaseException | None = None) -> bool:
        """Whether it had not ended before."""
        if self.finish is not None:
            return False
        self.finish, self.error = finish, error
        self._put(_END)
        self._ended.set()
        return True

    def _put(self, value: Any) -> None:
        self._steps.put(value)
        for loop, event in tuple(self._wakes):
            self._wake(loop, event)

    def _wake(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()


def refuse_another_process(process: int) -> None:
    """Raise EngineClosedError in a process that was forked off ``process``: the engine's thread runs in that alone."""
    if process != os.getpid():
        raise EngineClosedError(
            f"this engine was made in process {process}, and process {os.getpid()} was forked off that without its thread: "
            "open the bundle and make an engine in each process"
        )

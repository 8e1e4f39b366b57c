"""Long work, step by step: what is being done, how far, and how long it took. Logs; a command line may draw bars."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]
Unit = Literal["bytes", "parts"]


class Steps:
    """Keeps the seconds of each step, and logs them. Subclasses draw.

    Attributes:
        seconds: by title, in the order of the work.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, total: int | None = None, unit: Unit = "bytes") -> Iterator[Advance]:
        """One step of ``total`` units, where that is known; yields a function that is told how many more are done."""
        logger.info("%s ...", title)
        started = time.perf_counter()
        with self.drawn(title, total, unit) as advance:
            yield advance
        self.seconds[title] = time.perf_counter() - started
        logger.info("%s: %.1f s", title, self.seconds[title])

    @contextmanager
    def drawn(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        """What people see of a step; nothing here."""
        yield lambda count: None

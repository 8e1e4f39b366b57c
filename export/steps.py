"""Long work, step by step: what is being done, how far, and how long it took. Logs; a command line may draw bars."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]


class Steps:
    """Keeps the seconds of each step, and logs them. Subclasses draw.

    Attributes:
        seconds: by title, in the order of the work.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        """One step; yields a function that is told the bytes done."""
        logger.info("%s ...", title)
        started = time.perf_counter()
        with self.drawn(title, total_bytes) as advance:
            yield advance
        self.seconds[title] = time.perf_counter() - started
        logger.info("%s: %.1f s", title, self.seconds[title])

    @contextmanager
    def drawn(self, title: str, total_bytes: int | None) -> Iterator[Advance]:
        """What people see of a step; nothing here."""
        yield lambda num_bytes: None

"""A bundle opened, proven and warm, with an engine over it: what one replica of a service is, whoever starts it.

Ray and Triton each make one per process. It knows of neither.
"""

import logging
import time
from pathlib import Path

import motrt
from motrt.errors import EngineClosedError
from motrt.runtime.bundle import open_bundle
from motrt.runtime.engine import Engine, EngineOptions
from motrt.runtime.session import Session
from motrt.serve.service import THREAD_ENDED

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 2


class Replica:
    """One session and one engine, ready when the constructor returns. ``close`` ends both.

    Args:
        bundle: its folder.
        backend: as of ``motrt.load``.
        threads: likewise.
        options: of the engine.
        check: as of ``motrt.load``; empty: ``answer`` where the bundle carries one, else ``size``.

    Raises:
        MotrtError: when the bundle can not be opened, or what runs does not give the answer that it carries.
    """

    def __init__(
        self,
        bundle: str | Path,
        backend: str = "auto",
        threads: int = 0,
        options: EngineOptions | None = None,
        check: str = "",
    ) -> None:
        started = time.perf_counter()
        self.session = open_proven(bundle, backend, threads, check)
        try:
            self.engine = Engine(self.session, options)
            self._warm_up()
        except BaseException:
            self.close()
            raise
        logger.info("%s is ready in %.1f s (%s)", bundle, time.perf_counter() - started, self.session.backend)

    def _warm_up(self) -> None:
        """A few tokens of each modality: the first pass of a kernel is slow, and nobody should wait for it."""
        tokens = min(WARM_UP_TOKENS, self.session.config.max_seq_len - 1)
        for name in self.session.config.modality_names:
            if tokens:
                list(self.engine.generate([0], schedule=motrt.then(name, tokens=tokens)))

    def check(self) -> None:
        """Nothing while requests are served.

        Raises:
            EngineClosedError: when the engine is broken: this replica will serve nothing any more.
        """
        failure = self.engine.failure or ("" if self.engine.is_alive else THREAD_ENDED)
        if failure:
            raise EngineClosedError(failure)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Let requests finish for so long, end what is left, let go of the model. Closing twice is closing once."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close(drain_seconds)
        self.session.close()


def open_proven(bundle: str | Path, backend: str = "auto", threads: int = 0, check: str = "") -> Session:
    """A session that passed ``check``, or gave the bundle's known answer; where it has none, its files have the right sizes."""
    if not check and open_bundle(bundle).manifest.answer is None:
        logger.warning("%s carries no known answer, so this session is not asked for it: export it again", bundle)
        check = "size"
    return motrt.load(bundle, backend=backend, num_threads=threads, check=check or "answer")

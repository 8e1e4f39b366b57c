"""From a bundle to an engine that is ready, and from there to one that has drained. Knows no HTTP.

A service is ready when the session is open (and has given the bundle's known answer, where that was asked), and one token of
every modality has been generated. It stops being ready when it drains and when the engine is broken, and says why.
"""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from motrt.errors import BackendError, EngineClosedError, InputError
from motrt.runtime.bundle import is_bundle, open_bundle
from motrt.runtime.engine import Engine, EngineObserver
from motrt.runtime.load import load
from motrt.runtime.schedule import then
from motrt.runtime.session import Session
from motrt.serve.options import ServeOptions

logger = logging.getLogger(__name__)

Loader = Callable[[], Session]

# A prompt of one id and a token after it: more than this a first answer does not take.
WARM_UP_SECONDS = 600.0

LOADING, DRAINING = "the model is being loaded", "the server is shutting down and takes no more requests"
THREAD_ENDED = "the engine's thread has ended: nothing is generated any more, and only another start helps"


def loader_of(path: Path, options: ServeOptions) -> Loader:
    """What opens the bundle (or checkpoint) at ``path`` as ``options`` say; nothing is opened yet."""
    return lambda: load(path, options.backend, check_for(path, options), options.threads)


def check_for(path: Path, options: ServeOptions) -> str | Collection[str]:
    """The check that was asked for; where none was, the strictest that there can be.

    Raises:
        BundleError: when the bundle is missing or damaged.
    """
    if options.check is not None:
        return options.check
    if not is_bundle(path):
        return "size"
    manifest = open_bundle(path).manifest
    if manifest.answer is None or (options.backend == "torch" and manifest.quantization is not None):
        logger.warning("the bundle's known answer can not be asked for: only its files' sizes are checked")
        return "size"
    return "answer"


class Service:
    """An engine from its loading to its end.

    Args:
        source: an engine, which stays its maker's to close and is told ``observer``; or what opens a session, which is then
            opened by ``start`` and closed by ``close``.
        options: of the server.
        observer: told what happens once the service is warm.

    Attributes:
        engine: None until it is loaded.
        load_failure: what stood in the way of that.
    """

    def __init__(self, source: Engine | Loader, options: ServeOptions, observer: EngineObserver | None = None) -> None:
        self.options = options
        self.observer = observer or EngineObserver()
        self.engine: Engine | None = source if isinstance(source, Engine) else None
        self.load_failure: BaseException | None = None
        self.is_draining = False
        self._loader = None if isinstance(source, Engine) else source
        self._is_warm = False
        self._lock = threading.Lock()
        self._starting: threading.Thread | None = None

    def start(self) -> None:
        """Begin to load and warm up, in a thread, if that has not begun; ``reason`` tells how far it is."""
        with self._lock:
            if self._starting is not None:
                return
            # Not a daemon: a thread in the midst of onnxruntime, when the interpreter ends, ends the process by SIGABRT.
            self._starting = threading.Thread(target=self._start, name="motrt-load")
            self._starting.start()

    def start_late(self) -> None:
        """Begin now, where nobody has: what a request to an application does whose lifespan was not run."""
        if self._starting is None and not self.is_draining:
            logger.warning(
                "the application's lifespan was not run, as where it is mounted in another one: the model is loaded now, "
                "for the first request, and nobody closes it. Enter app.router.lifespan_context(app) in the outer lifespan"
            )
            self.start()

    @property
    def is_loading(self) -> bool:
        """Whether the thread that ``start`` made still works."""
        return self._starting is not None and self._starting.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the service is ready, once it has loaded or failed, or so long has passed."""
        if self._starting is not None:
            self._starting.join(seconds)
        return not self.reason

    @property
    def reason(self) -> str:
        """Why the service is not ready; empty where it is."""
        if self.is_draining:
            return DRAINING
        if self.load_failure is not None:
            return f"the model could not be loaded: {self.load_failure}"
        if self.engine is None:
            return LOADING
        if self.engine.failure:
            return self.engine.failure
        if not self.engine.is_alive:
            return THREAD_ENDED
        return "" if self._is_warm else "the model is being warmed up"

    @property
    def is_lost(self) -> bool:
        """Whether only another start can help."""
        if self.load_failure is not None:
            return True
        if self.engine is None:
            return False
        return bool(self.engine.failure) or not (self.engine.is_alive or self.is_draining)

    def ready_engine(self) -> Engine:
        """The engine.

        Raises:
            EngineClosedError: when it is not ready, saying why.
        """
        reason = self.reason
        if reason or self.engine is None:
            raise EngineClosedError(reason)
        return self.engine

    def drain(self) -> None:
        """Take no more requests, and wait for those there are, as long as the options say; the others end with an error."""
        with self._lock:
            self.is_draining = True
            engine = self.engine
        if engine is not None:
            engine.close(self.options.drain_seconds)

    def close(self) -> None:
        """Drain, and close what ``start`` opened."""
        if self._loader is None:
            self.is_draining = True
            return
        self.drain()
        if self.engine is not None:
            self.engine.session.close()

    def _start(self) -> None:
        try:
            if self._loader is not None:
                self._open(self._loader())
            if self.engine is not None:
                warm_up(self.engine)
                self.engine.observer = self.observer
                self._is_warm = True
        except BaseException as failure:  # a panic of native code is no Exception, and nobody may wait for ever
            if not self.is_draining:
                self.load_failure = failure
                logger.error("the model could not be loaded: %s", failure)

    def _open(self, session: Session) -> None:
        with self._lock:
            if self.is_draining:  # nobody waits for it any more
                session.close()
                return
            try:
                self.engine = Engine(session, self.options.engine())
            except InputError:
                session.close()
                raise


def warm_up(engine: Engine) -> None:
    """Generate a token of every modality: what is made at a first pass is then made.

    Raises:
        BackendError: when that does not succeed.
    """
    config = engine.session.config
    for name in config.modality_names:
        stream = engine.submit([config.id_ranges[0].start], schedule=then(name, tokens=min(2, config.max_seq_len - 1)))
        if not stream.wait(WARM_UP_SECONDS):
            stream.cancel()
            raise BackendError(f"no token of {name} was generated within {WARM_UP_SECONDS:.0f} seconds")
        if stream.error is not None:
            raise stream.error

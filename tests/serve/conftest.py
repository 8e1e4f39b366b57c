"""What tests of the server share: the tiny bundle behind a real server."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from motrt.runtime.engine import Engine
from motrt.runtime.load import load
from motrt.serve.options import ServeOptions
from motrt.tests.serve.served import Serve, Served, running


@pytest.fixture
def serve(tiny_bundle: Path) -> Serve:
    """What makes servers of the tiny bundle, with options of their own."""

    @contextmanager
    def make(**options: Any) -> Iterator[Served]:
        chosen = ServeOptions(**{"model_name": "tiny", "drain_seconds": 0, **options})
        with running(lambda: load(tiny_bundle, num_threads=1), chosen) as served:
            assert served.service.wait(20)
            yield served

    return make


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    """One server for all tests of a file that leave it as it was."""
    with running(lambda: load(tiny_bundle, num_threads=1), ServeOptions(model_name="tiny", drain_seconds=0)) as one:
        assert one.service.wait(20)
        yield one


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine, float], None]:
    """Makes an engine's decode steps take so long, so that tests can look at requests that go on."""

    def slow(engine: Engine, seconds: float) -> None:
        step = engine.session.decode_step

        def slow_step(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return step(*args, **kwargs)

        monkeypatch.setattr(engine.session, "decode_step", slow_step)

    return slow

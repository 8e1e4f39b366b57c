"""Ray Serve on one machine: two replicas stream, one is killed, the other goes on and so does the service."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import motrt
from motrt.errors import EngineClosedError, InputError
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import ModelConfig

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'motrt[ray]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'motrt[ray]'")

PORT = 18327
TOKENS = 600
REQUEST = {"prompt": [1, 2, 3], "schedule": "interleave:text=5,audio=8", "max_tokens": TOKENS, "temperature": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def bundle(make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to kill something in the middle."""
    out = tmp_path_factory.mktemp("ray") / "bundle"
    export_bundle(make_checkpoint(ModelConfig.tiny()), out, "fp32", verify=False, max_seq_len=1024)
    return out


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[int]:
    with motrt.load(bundle, num_threads=1) as session:
        schedule, sampling = motrt.interleave(text=5, audio=8), motrt.Sampling(temperature=0.9, seed=11)
        return [one.token_id for one in session.generate([1, 2, 3], schedule=schedule, sampling=sampling, max_tokens=TOKENS)]


@pytest.fixture(scope="module")
def handle(bundle: Path) -> Iterator[Any]:
    from ray import serve

    from motrt.serve.ray import app

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        words = {"bundle": str(bundle), "replicas": "2", "threads": "1", "cpus": "0.1", "health_seconds": "1"}
        yield serve.run(app(words))
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call, unused-ignore]
        ray.shutdown()


def two_streams(handle: Any) -> dict[int, tuple[Iterator[dict[str, Any]], dict[str, Any]]]:
    """By process, a stream that has begun in it, and its first step; Ray chooses, so it is asked until both were chosen."""
    found: dict[int, tuple[Iterator[dict[str, Any]], dict[str, Any]]] = {}
    for _ in range(20):
        steps = iter(handle.options(stream=True).stream.remote(REQUEST))
        first = next(steps)
        found.setdefault(first["process"], (steps, first))
        if len(found) == 2:
            return found
    raise AssertionError("twenty requests went to one replica")


def ids_of(handle: Any) -> list[int]:
    return [step["token_id"] for step in handle.options(stream=True).stream.remote(REQUEST)]


def test_both_replicas_say_what_one_session_says_alone(handle: Any, alone: list[int]) -> None:
    for steps, first in two_streams(handle).values():
        assert [first["token_id"], *(step["token_id"] for step in steps)] == alone


def post(values: Any) -> bytes:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(values).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def test_completions_over_http_are_the_servers_own_and_say_the_same(handle: Any, bundle: Path, alone: list[int]) -> None:
    pieces = post({**REQUEST, "model": bundle.name, "stream": True}).decode().strip().split("\n\n")
    assert pieces[-1] == "data: [DONE]" and len(pieces) > TOKENS / 2
    events = [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-1]]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == alone
    assert json.loads(post({**REQUEST, "model": bundle.name}))["choices"][0]["token_ids"] == alone
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=30) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError) as refused:
        post({"model": bundle.name, "prompt": [1], "colour": "red"})
    with refused.value as told:
        assert told.code == 400 and "colour" in told.read().decode()


def test_a_replica_that_is_killed_takes_only_its_own_streams_with_it(handle: Any, alone: list[int]) -> None:
    (killed, (lost, _)), (_, (kept, first)) = two_streams(handle).items()
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayError):
        list(lost)
    assert [first["token_id"], *(step["token_id"] for step in kept)] == alone
    assert ids_of(handle) == alone
    until = time.monotonic() + 30
    while time.monotonic() < until and killed in (now := two_streams(handle)):
        time.sleep(0.5)
    assert len(now) == 2 and killed not in now, "nobody took the killed one's place"


# Without Ray's processes.


def test_settings_are_read_from_words_and_every_wrong_one_is_named() -> None:
    from motrt.serve.ray import RaySettings

    found = RaySettings.from_words({"bundle": "b", "replicas": "2", "most_replicas": "4", "gpus": "0.5"})
    options = found.deployment_options()
    assert options["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 8}
    assert options["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 0.5}
    found = RaySettings.from_words(
        {"bundle": "b", "allowed_hosts": "a.example, b.example", "max_priority": "3", "check": "hash,answer"}
    )
    served = found.serve_options()
    assert (served.allowed_hosts, served.max_priority, served.check) == (("a.example", "b.example"), 3, "hash,answer")
    with pytest.raises(InputError, match="check must be"):
        RaySettings("b", check="trust")
    with pytest.raises(InputError, match=r"(?s)'colour' is not known.*replicas must be of type int.*no bundle"):
        RaySettings.from_words({"colour": "red", "replicas": "two"})
    with pytest.raises(InputError, match=r"(?s)replicas must be at least 1.*cpus must not be negative"):
        RaySettings("b", replicas=0, cpus=-1)


def test_a_broken_engine_fails_the_health_check(bundle: Path) -> None:
    from motrt.serve.ray import BundleServer, RaySettings

    server = BundleServer(RaySettings(str(bundle), threads=1))
    server.check_health()
    server.replica.engine.failure = "3 steps in a row failed"
    with pytest.raises(EngineClosedError, match="3 steps"):
        server.check_health()
    server.replica.close()

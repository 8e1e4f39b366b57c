"""Ray Serve: replicas of one bundle on one machine or many, more of them when requests pile up.

    serve run motrt.serve.ray:app bundle=BUNDLE replicas=2
    python -m motrt.serve.ray BUNDLE --replicas 2

Each replica is a process with a session and an engine of its own; requests that reach it share its batch. Ray sends a request to
the replica with fewer ongoing ones, replaces a replica whose engine is broken, and lets one that has to go finish what it began.
Over HTTP a request is one JSON object (``plain_request``), and the answer one JSON object a line, as tokens come. A handle gives
the same objects: ``handle.options(stream=True).stream.remote({"prompt": [1, 2, 3]})``.

Who may ask is not known here: put this behind something that knows.
"""

import argparse
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from motrt.errors import BusyError, EngineClosedError, InputError, MotrtError, raise_all
from motrt.runtime.decoding import Step
from motrt.runtime.engine import EngineOptions
from motrt.serve.plain_request import plain_step, submit_options
from motrt.serve.replica import Replica

STATUS_OF_ERROR = {InputError: 400, BusyError: 429, EngineClosedError: 503}


@dataclass(frozen=True)
class RaySettings:
    """What is served, and by how many.

    Attributes:
        bundle: its folder, where each machine finds it.
        replicas: at least so many.
        most_replicas: at most so many, while more than ``target_requests`` go on in each; the same as ``replicas``: no autoscaling.
        target_requests: ongoing requests per replica, waiting ones included, that autoscaling aims for; 0: ``max_batch``.
        backend: as of ``motrt.load``.
        threads: for products, per replica; 0: one per core. Several replicas on a machine should share its cores.
        cpus: that Ray reserves per replica.
        gpus: likewise.
        max_batch: as of ``EngineOptions``.
        max_queue: likewise.
        drain_seconds: how long a replica that has to go may finish what it began.
        health_seconds: between two looks at a replica's health.
    """

    bundle: str
    replicas: int = 1
    most_replicas: int = 0
    target_requests: int = 0
    backend: str = "auto"
    threads: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    max_batch: int = EngineOptions.max_batch
    max_queue: int = EngineOptions.max_queue
    drain_seconds: float = 60.0
    health_seconds: float = 5.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least} ({getattr(self, name)!r} came)"
            for name, least in (("replicas", 1), ("most_replicas", 0), ("target_requests", 0), ("threads", 0))
            if getattr(self, name) < least
        ]
        problems += [f"{name} must not be negative" for name in ("cpus", "gpus", "drain_seconds") if getattr(self, name) < 0]
        if self.health_seconds <= 0:
            problems.append("health_seconds must be above 0")
        if 0 < self.most_replicas < self.replicas:
            problems.append(f"most_replicas must be at least replicas ({self.most_replicas} and {self.replicas} came)")
        raise_all(InputError, "settings for Ray:", problems)
        self.engine_options()

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> "RaySettings":
        """Settings of ``name=value`` words.

        Raises:
            InputError: for names that there are not, and values of another kind, all at once; and without a bundle.
        """
        kinds: dict[str, Any] = {
            one.name: {"str": str, "int": int, "float": float}[str(_name_of(one.type))] for one in fields(cls)
        }
        problems, values = [], {}
        for name, word in words.items():
            try:
                values[name] = kinds[name](word)
            except KeyError:
                problems.append(f"{name!r} is not known: there are {', '.join(kinds)}")
            except (TypeError, ValueError):
                problems.append(f"{name} must be of type {kinds[name].__name__} ({word!r} came)")
        if "bundle" not in words:
            problems.append("no bundle is named: bundle=FOLDER")
        raise_all(InputError, "settings for Ray:", problems)
        return cls(**values)

    def engine_options(self) -> EngineOptions:
        return EngineOptions(max_batch=self.max_batch, max_queue=self.max_queue)

    def deployment_options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        options: dict[str, Any] = {
            "max_ongoing_requests": self.max_batch + self.max_queue,
            "graceful_shutdown_timeout_s": self.drain_seconds
            + 5.0,  # the replica ends what is left itself, before it is killed
            "health_check_period_s": self.health_seconds,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }
        if self.most_replicas <= self.replicas:
            return {**options, "num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.most_replicas,
            "target_ongoing_requests": self.target_requests or self.max_batch,
        }
        return {**options, "autoscaling_config": scaling}


def _name_of(kind: Any) -> str:
    return kind if isinstance(kind, str) else kind.__name__


class BundleServer:
    """What runs in each replica. Ray routes to it once the constructor has returned: proven and warm."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        self.replica = Replica(settings.bundle, settings.backend, settings.threads, settings.engine_options())

    def check_health(self) -> None:
        """Asked by Ray every ``health_seconds``; what is raised here has the replica replaced."""
        self.replica.check()

    def __del__(self) -> None:
        """Called by Ray when the replica has finished what it began, or may wait no longer."""
        if hasattr(self, "replica"):
            self.replica.close()

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """A plain request's steps, as they come. Whoever stops listening has it cancelled."""
        async for step in self.replica.engine.stream(**submit_options(request)):
            yield self._told(step)

    async def __call__(self, request: Request) -> Response:
        """The same over HTTP: POST an object; lines of objects come back. GET: whether this replica serves."""
        try:
            if request.method == "GET":
                self.replica.check()
                return JSONResponse({"status": "ready"})
            steps = self.replica.engine.submit(**submit_options(await _json_of(request))).events()
        except (InputError, BusyError, EngineClosedError) as failure:
            status = next(status for kind, status in STATUS_OF_ERROR.items() if isinstance(failure, kind))
            return JSONResponse(_told_error(failure), status_code=status)
        return StreamingResponse(self._lines(steps), media_type="application/x-ndjson")

    async def _lines(self, steps: AsyncIterator[Step]) -> AsyncIterator[str]:
        try:
            async for step in steps:
                yield json.dumps(self._told(step)) + "\n"
        except MotrtError as failure:  # the status is sent already: the last line says it
            yield json.dumps(_told_error(failure)) + "\n"

    def _told(self, step: Step) -> dict[str, Any]:
        """The first step says besides who answers."""
        return plain_step(step) | ({"process": os.getpid()} if step.index == 0 else {})


async def _json_of(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as failure:
        raise InputError(f"the body must be one JSON object ({failure})") from None


def _told_error(failure: MotrtError) -> dict[str, str]:
    return {"error": type(failure).__name__, "message": str(failure)}


def application(settings: RaySettings) -> Application:
    """What ``serve.run`` takes."""
    return serve.deployment(BundleServer, name="motrt").options(**settings.deployment_options()).bind(settings)


def app(words: dict[str, str]) -> Application:
    """For ``serve run motrt.serve.ray:app bundle=... replicas=2``: every attribute of ``RaySettings`` may be set so."""
    return application(RaySettings.from_words(words))


def main(arguments: Sequence[str] | None = None) -> None:
    """For ``python -m motrt.serve.ray``: serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m motrt.serve.ray", description="Serve a bundle with Ray Serve.")
    parser.add_argument("bundle", help="its folder; the same on every machine")
    for one in fields(RaySettings)[1:]:
        parser.add_argument(f"--{one.name.replace('_', '-')}", default=str(one.default), help=f"{one.default} where not said")
    words = vars(parser.parse_args(arguments))
    words["bundle"] = str(Path(words["bundle"]).resolve())  # replicas have working folders of their own
    try:
        # By its own name: a class of __main__ could not be found again in a replica.
        from motrt.serve import ray as itself

        served = itself.app(words)
    except MotrtError as failure:
        parser.error(str(failure))
    serve.run(served, blocking=True)


if __name__ == "__main__":
    main()

"""Ray Serve: replicas of one bundle on one machine or many, more of them when requests pile up.

    serve run motrt.serve.ray:app bundle=BUNDLE replicas=2
    python -m motrt.serve.ray BUNDLE --replicas 2

Each replica is a process with a session and an engine of its own; requests that reach it share its batch. Ray sends a request
to the replica with fewer ongoing ones, replaces a replica whose engine is broken, and lets one that has to go finish what it
began. Over HTTP every replica speaks what ``motrt serve`` speaks (``app``), with its keys and limits; what a limit counts, each
replica counts by itself. A handle gives plain objects (``plain_request``):
``handle.options(stream=True).stream.remote({"prompt": [1, 2, 3]})``.
"""

import argparse
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from motrt.errors import InputError, MotrtError, raise_all
from motrt.serve.app import create_app
from motrt.serve.options import ServeOptions
from motrt.serve.plain_request import plain_step, submit_options
from motrt.serve.replica import Replica

# Longer than the app's own drain, so that a replica ends what is left itself, before Ray kills it.
GOODBYE_SECONDS = 5.0


@dataclass(frozen=True)
class RaySettings:
    """What is served, and by how many.

    Attributes:
        bundle: its folder, where each machine finds it.
        replicas: at least so many.
        most_replicas: at most so many, while more than ``target_requests`` go on in each; 0: ``replicas``, no autoscaling.
        target_requests: ongoing requests per replica, waiting ones included, that autoscaling aims for; 0: ``max_batch``.
        backend: as of ``motrt.load``.
        threads: for products, per replica; 0: one per core. Several replicas on a machine should share its cores.
        cpus: that Ray reserves per replica.
        gpus: likewise.
        model_name: what requests call the model; empty: the name of the bundle's folder.
        api_key_file: likewise, on each machine; empty: no key is asked for.
        allowed_hosts: as of ``ServeOptions``, with commas between.
        max_priority: likewise; of a handle's requests, too.
        check: as of ``motrt.load``; empty: ``answer`` where the bundle carries one, else ``size``.
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
    model_name: str = ""
    api_key_file: str = ""
    allowed_hosts: str = ""
    max_priority: int = ServeOptions.max_priority
    check: str = ""
    max_batch: int = ServeOptions.max_batch
    max_queue: int = ServeOptions.max_queue
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
        self.serve_options()

    @classmethod
    def from_words(cls, words: Mapping[str, str]) -> "RaySettings":
        """Settings of ``name=value`` words.

        Raises:
            InputError: for names that there are not, and values of another kind, all at once; and without a bundle.
        """
        kinds: dict[str, Any] = {
            one.name: {"str": str, "int": int, "float": float}[str(_name_of(one.type))] for one in fields(cls)
        }
        problems = [f"{name!r} is not known: there are {', '.join(kinds)}" for name in words if name not in kinds]
        known = {name: word for name, word in words.items() if name in kinds}
        problems += [
            f"{name} must be of type {kinds[name].__name__} ({word!r} came)"
            for name, word in known.items()
            if not _is_of(kinds[name], word)
        ]
        if "bundle" not in words:
            problems.append("no bundle is named: bundle=FOLDER")
        raise_all(InputError, "settings for Ray:", problems)
        return cls(**{name: kinds[name](word) for name, word in known.items()})

    def serve_options(self) -> ServeOptions:
        """What the application of each replica allows."""
        return ServeOptions(
            model_name=self.model_name or Path(self.bundle).name or ServeOptions.model_name,
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            drain_seconds=self.drain_seconds,
            api_key_file=Path(self.api_key_file) if self.api_key_file else None,
            allowed_hosts=tuple(one.strip() for one in self.allowed_hosts.split(",") if one.strip()),
            max_priority=self.max_priority,
            check=self.check or None,
            backend=self.backend,
            threads=self.threads,
        )

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
    return kind if isinstance(kind, str) else str(kind.__name__)


def _is_of(kind: Any, word: str) -> bool:
    try:
        kind(word)
    except (TypeError, ValueError):
        return False
    return True


class BundleServer:
    """What runs in each replica. Ray routes to it once the constructor has returned: proven and warm."""

    def __init__(self, settings: RaySettings) -> None:
        self.settings = settings
        options = settings.serve_options().engine()
        self.replica = Replica(settings.bundle, settings.backend, settings.threads, options, settings.check)

    def check_health(self) -> None:
        """Asked by Ray every ``health_seconds``; what is raised here has the replica replaced."""
        self.replica.check()

    def __del__(self) -> None:
        """Called by Ray when the replica has finished what it began, or may wait no longer."""
        if hasattr(self, "replica"):
            self.replica.close()

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """A plain request's steps, as they come; the first says who answers. Whoever stops listening has it cancelled."""
        async for step in self.replica.engine.stream(**submit_options(request, self.settings.max_priority)):
            yield plain_step(step) | ({"process": os.getpid()} if step.index == 0 else {})

    def __serve_build_asgi_app__(self) -> Any:
        """Asked by Ray once per replica: the application over this replica's engine, ready."""
        app = create_app(self.replica.engine, self.settings.serve_options())
        app.state.service.start()
        app.state.service.wait()
        return app


def application(settings: RaySettings) -> Application:
    """What ``serve.run`` takes."""
    deploy = serve.deployment(name="motrt", **settings.deployment_options())
    deployed: Application = deploy(serve.ingress()(BundleServer)).bind(settings)
    return deployed


def app(words: dict[str, str]) -> Application:
    """For ``serve run motrt.serve.ray:app bundle=... replicas=2``: every attribute of ``RaySettings`` may be set so."""
    return application(RaySettings.from_words(words))


def main(arguments: Sequence[str] | None = None) -> None:
    """For ``python -m motrt.serve.ray``: serve until interrupted, then let replicas finish what they began."""
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
    try:
        serve.run(served, blocking=True)
    except KeyboardInterrupt:
        end: Any = serve.shutdown  # Ray gives it no types
        end()


if __name__ == "__main__":
    main()

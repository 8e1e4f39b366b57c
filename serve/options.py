"""How a server is set up: limits of everything a client can ask for, checked when they are made. Knows no HTTP library."""

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motrt.errors import InputError, raise_all
from motrt.runtime.engine import EngineOptions
from motrt.runtime.load import BACKENDS, CHECKS, MOST_THREADS

SHORTEST_KEY = 16

_DAY = 86400.0


@dataclass(frozen=True)
class ServeOptions:
    """What a server allows.

    Attributes:
        host: where it listens; another than this machine's own should come with keys.
        port: likewise; 0 takes a free one.
        model_name: what requests call the model.
        max_batch: rows that decode together.
        max_queue: requests that wait beside them; one more is answered 429.
        prefill_chunk: as of ``EngineOptions``.
        max_body_bytes: of a request; a larger one is answered 413 without being read to its end.
        max_prompt_tokens: of a request; None: as many as the model holds.
        max_tokens: likewise, of an answer.
        body_seconds: within which a request's body must have come, else 408.
        request_seconds: most time for an answer, waiting included; what has come by then is the answer.
        requests_per_minute: completions of one key (of one address where there are no keys); 0: no limit.
        drain_seconds: how long requests may go on after SIGTERM.
        api_key_file: one key a line, read once; None: no key is asked for.
        check: of the bundle, as of ``motrt.load``; None: ``answer`` where it carries one, else ``size``.
        backend: as of ``motrt.load``.
        threads: likewise, ``num_threads``.

    Raises:
        InputError: naming every value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "motrt"
    max_batch: int = 8
    max_queue: int = 64
    prefill_chunk: int = 64
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    body_seconds: float = 10.0
    request_seconds: float = 600.0
    requests_per_minute: int = 0
    drain_seconds: float = 30.0
    api_key_file: Path | None = None
    check: str | None = None
    backend: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number in {least}..{most} ({getattr(self, name)!r} came)"
            for name, least, most in (
                ("port", 0, 65535),
                ("max_body_bytes", 1, 1 << 30),
                ("requests_per_minute", 0, 1 << 20),
                ("threads", 0, MOST_THREADS),
            )
            if not _is_whole(getattr(self, name), least, most)
        ]
        problems += [
            f"{name} must be a whole number of at least 1, or None ({getattr(self, name)!r} came)"
            for name in ("max_prompt_tokens", "max_tokens")
            if getattr(self, name) is not None and not _is_whole(getattr(self, name), 1, 1 << 30)
        ]
        problems += [
            f"{name} must be a number of seconds from {least} to {_DAY:.0f} ({getattr(self, name)!r} came)"
            for name, least in (("body_seconds", 0.001), ("request_seconds", 0.001), ("drain_seconds", 0))
            if not _is_number(getattr(self, name), least, _DAY)
        ]
        if not (isinstance(self.model_name, str) and 1 <= len(self.model_name) <= 128 and self.model_name.isprintable()):
            problems.append(f"model_name must be 1 to 128 printable characters ({self.model_name!r} came)")
        if self.check is not None and self.check not in CHECKS:
            problems.append(f"check must be one of {', '.join(CHECKS)}, or None ({self.check!r} came)")
        if self.backend not in BACKENDS:
            problems.append(f"backend must be one of {', '.join(BACKENDS)} ({self.backend!r} came)")
        raise_all(InputError, "a server can not be set up so:", problems)
        self.engine()

    def engine(self) -> EngineOptions:
        """The engine's share of them."""
        return EngineOptions(self.max_batch, self.max_queue, self.prefill_chunk)


class ApiKeys:
    """The keys that open a server; nobody can read them back from here."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def number_of(self, key: bytes) -> int | None:
        """Which key it is; None for none of them. Takes the same time for every key: all are compared, by their hashes."""
        came, found = _digest(key), None
        for number, digest in enumerate(self._digests):
            if hmac.compare_digest(came, digest):
                found = number
        return found


def read_keys(path: Path) -> ApiKeys:
    """The keys in a file, one a line; empty lines are skipped.

    Raises:
        InputError: for a file that can not be read, holds no key, or a key that can be guessed or not be sent.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="ascii").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"{path} must hold one key a line, in ASCII, so that a header can carry it") from None
    except OSError as failure:
        raise InputError(f"{path} must hold one key a line, and can not be read: {failure.strerror}") from None
    keys = [line for line in lines if line]
    if not keys:
        raise InputError(f"{path} holds no key: write one a line, or leave --api-key-file out to ask for none")
    raise_all(
        InputError,
        f"{path} holds keys that can not be used:",
        [
            f"key {number} must have at least {SHORTEST_KEY} printable characters and no blank (it has {len(key)} characters)"
            for number, key in enumerate(keys, 1)
            if len(key) < SHORTEST_KEY or not key.isprintable() or " " in key
        ],
    )
    return ApiKeys(keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

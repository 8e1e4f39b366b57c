"""How a server is set up: limits of everything a client can ask for, checked when they are made. Knows no HTTP library."""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motrt.errors import InputError, raise_all
from motrt.runtime.engine import EngineOptions
from motrt.runtime.load import BACKENDS, MOST_THREADS, checks_of

SHORTEST_KEY = 16

# Of a request, either way from 0.
HIGHEST_PRIORITY = 100

_DAY = 86400.0

_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class ServeOptions:
    """What a server allows.

    Attributes:
        host: where it listens; another than this machine's own should come with keys.
        port: likewise; 0 takes a free one.
        root_path: what stands before every path, where a proxy passes a part of a site on, as in ``/llm``. Of an application
            that is mounted, or whose server knows it, leave it empty.
        allowed_hosts: names and addresses that requests may ask for beside this machine's own and ``host``; ``*``: any. Where
            none is given and keys are asked for, any name will do.
        trusted_proxies: addresses and networks whose X-Forwarded-For and -Proto are believed; no others are.
        cors_origins: of the sites whose pages may ask from a browser, as in ``https://site.example``; ``*``: all.
        model_name: what requests call the model.
        max_batch: rows that decode together.
        max_queue: requests that wait beside them; one more is answered 429.
        prefill_chunk: as of ``EngineOptions``.
        max_body_bytes: of a request; a larger one is answered 413 without being read to its end.
        max_prompt_tokens: of a request; None: as many as the model holds.
        max_tokens: likewise, of an answer.
        max_priority: the highest that counts; a request of a higher one is one of this.
        max_connections: at once; fewer where the process may open fewer files. One more takes the place of the one that has
            waited longest without a request, or waits itself.
        header_seconds: within which a request's line and headers must have come, from the connection's start or their first
            byte; else the connection ends.
        keep_alive_seconds: that a connection may say nothing after an answer.
        body_seconds: within which a request's body must have come, else 408.
        request_seconds: most time for an answer, waiting included; what has come by then is the answer.
        requests_per_minute: completions of one key (of one address where there are no keys); 0: no limit.
        drain_seconds: how long requests may go on after SIGTERM.
        api_key_file: one key a line, read once; None: no key is asked for.
        check: of the bundle, one or several as of ``motrt.load``; None: ``answer`` where it carries one, else ``size``.
        backend: as of ``motrt.load``.
        threads: likewise, ``num_threads``.

    Raises:
        InputError: naming every value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    model_name: str = "motrt"
    max_batch: int = 8
    max_queue: int = 64
    prefill_chunk: int = 64
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_priority: int = 0
    max_connections: int = 1000
    header_seconds: float = 10.0
    keep_alive_seconds: int = 5
    body_seconds: float = 10.0
    request_seconds: float = 600.0
    requests_per_minute: int = 0
    drain_seconds: float = 30.0
    api_key_file: Path | None = None
    check: str | Collection[str] | None = None
    backend: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be a whole number in {least}..{most} ({getattr(self, name)!r} came)"
            for name, least, most in (
                ("port", 0, 65535),
                ("max_body_bytes", 1, 1 << 30),
                ("requests_per_minute", 0, 1 << 20),
                ("max_priority", -HIGHEST_PRIORITY, HIGHEST_PRIORITY),
                ("max_connections", 1, 1 << 20),
                ("keep_alive_seconds", 1, int(_DAY)),
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
            for name, least in (
                ("header_seconds", 0.001),
                ("body_seconds", 0.001),
                ("request_seconds", 0.001),
                ("drain_seconds", 0),
            )
            if not _is_number(getattr(self, name), least, _DAY)
        ]
        if not (isinstance(self.model_name, str) and 1 <= len(self.model_name) <= 128 and self.model_name.isprintable()):
            problems.append(f"model_name must be 1 to 128 printable characters ({self.model_name!r} came)")
        problems += self._address_problems()
        try:
            checks_of(self.check if self.check is not None else "size")
        except InputError as failure:
            problems.append(str(failure))
        if self.backend not in BACKENDS:
            problems.append(f"backend must be one of {', '.join(BACKENDS)} ({self.backend!r} came)")
        raise_all(InputError, "a server can not be set up so:", problems)
        self.engine()

    def _address_problems(self) -> list[str]:
        """Of where it listens, and of who is believed."""
        problems = []
        if not (isinstance(self.host, str) and self.host != "*" and _is_host(self.host)):
            problems.append(f"host must be an address or a name; every address is 0.0.0.0 or :: ({self.host!r} came)")
        if not (isinstance(self.root_path, str) and _ROOT_PATH.fullmatch(self.root_path)):
            problems.append(f"root_path must be as in /llm, or empty ({self.root_path!r} came)")
        for name, is_right, told in (
            ("allowed_hosts", _is_host, "names or addresses without a port, as in motrt.example, or *"),
            ("trusted_proxies", _is_network, "addresses or networks, as in 10.0.0.7 or 10.0.0.0/8"),
            ("cors_origins", _is_origin, "as in https://site.example, without a path, or *"),
        ):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(one, str) and is_right(one) for one in given):
                problems.append(f"{name} must be {told} ({given!r} came)")
        return problems

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


def _is_host(text: str) -> bool:
    return text == "*" or _NAME.fullmatch(text) is not None or _is_network(text.removeprefix("[").removesuffix("]"), False)


def _is_network(text: str, may_have_mask: bool = True) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return may_have_mask or "/" not in text


def _is_origin(text: str) -> bool:
    return text == "*" or _ORIGIN.fullmatch(text) is not None

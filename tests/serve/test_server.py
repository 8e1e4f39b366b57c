"""The process itself: `motrt serve`, and how it ends."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from motrt.tests.serve.served import ASK, eventually


class Process:
    """`motrt serve` on a free port, with its log in a file."""

    def __init__(self, bundle: Path, log: Path, *options: str, before: Callable[[], None] | None = None) -> None:
        self.log = log
        command = [sys.executable, "-m", "motrt", "serve", str(bundle), "--port", "0", "--threads", "1", "--model-name", "tiny"]
        with log.open("w") as out:
            self.process = subprocess.Popen([*command, *options], stderr=out, preexec_fn=before)

    @property
    def url(self) -> str:
        found = re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())
        return found[0] if found else ""

    def is_ready(self) -> bool:
        try:
            return bool(self.url) and httpx.get(f"{self.url}/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, **values: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={**ASK, **values}, timeout=30)


@pytest.fixture
def process(tiny_bundle: Path, tmp_path: Path) -> Iterator[Process]:
    made = Process(tiny_bundle, tmp_path / "log", "--max-batch", "2")
    try:
        assert eventually(made.is_ready, 30), made.log.read_text()
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def test_sigterm_under_load_lets_requests_finish_and_exits_with_0(process: Process) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(process.ask, max_tokens=120) for _ in range(8)]
        assert eventually(lambda: httpx.get(f"{process.url}/v1/engine", timeout=5).json()["state"]["running"] == 2)
        process.process.send_signal(signal.SIGTERM)
        said = [answer.result() for answer in answers]
    assert process.process.wait(30) == 0
    statuses = {one.status_code for one in said}
    assert 200 in statuses
    assert statuses <= {200, 503}
    assert all(one.json()["usage"]["completion_tokens"] == 120 for one in said if one.status_code == 200)
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    assert sum(line.get("route") == "/v1/completions" for line in lines) == 8
    assert not [line for line in lines if "traceback" in line]


def test_a_bundle_that_can_not_be_loaded_ends_the_server_with_a_sentence(tmp_path: Path) -> None:
    failed = Process(tmp_path, tmp_path / "log")
    assert failed.process.wait(30) == 1
    said = (tmp_path / "log").read_text()
    assert "Error:" in said
    assert "Traceback" not in said


def test_a_second_signal_ends_the_server_at_once(process: Process) -> None:
    with httpx.stream("POST", f"{process.url}/v1/completions", json={**ASK, "max_tokens": 120, "stream": True}, timeout=30):
        process.process.send_signal(signal.SIGSTOP)  # so that both are there before it looks
        process.process.send_signal(signal.SIGTERM)
        process.process.send_signal(signal.SIGINT)
        process.process.send_signal(signal.SIGCONT)
        assert process.process.wait(30) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


@pytest.mark.parametrize("options", [("--host", "no-such-host.invalid"), ("--host", ""), ("--port", "taken")])
def test_an_address_that_can_not_be_had_is_a_sentence_and_nothing_is_loaded(
    options: tuple[str, str], tiny_bundle: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = [str(taken.getsockname()[1]) if one == "taken" else one for one in options]
        failed = Process(tiny_bundle, tmp_path / "log", *chosen)
        assert failed.process.wait(30) == (2 if options[1] == "" else 1)
    said = (tmp_path / "log").read_text()
    assert "Error:" in said and "Traceback" not in said
    assert "Started server" not in said and "is passed over" not in said


def test_sigterm_while_the_bundle_is_loaded_ends_the_server_with_0(tiny_bundle: Path, tmp_path: Path) -> None:
    """Planted: a load that nothing interrupts, as one in the midst of a library is, and that goes on longer than is waited."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time, motrt.serve.server as server\n"
        "server.GOODBYE_SECONDS = 0.2\n"
        "def loader_of(path, options):\n"
        "    def load():\n"
        "        print('loading', flush=True, file=__import__('sys').stderr)\n"
        "        time.sleep(600)\n"
        "    return load\n"
        "server.loader_of = loader_of\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([path] if path else [])]))
        process = Process(tiny_bundle, tmp_path / "log")
    try:
        assert eventually(lambda: "loading" in process.log.read_text(), 30)
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(30) == 0
    finally:
        process.process.kill()


@pytest.mark.parametrize(("checks", "is_served"), [(("answer",), True), (("hash", "answer"), False)])
def test_a_flipped_bit_that_the_answer_does_not_hear_is_found_by_the_hash_beside_it(
    checks: tuple[str, ...], is_served: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with (tmp_path / "bundle" / "model.onnx.data").open("r+b") as data:
        byte = data.read(1)[0]
        data.seek(0)
        data.write(bytes([byte ^ 1]))
    process = Process(tmp_path / "bundle", tmp_path / "log", *(word for one in checks for word in ("--check", one)))
    try:
        if is_served:
            assert eventually(process.is_ready, 30), process.log.read_text()
        else:
            assert process.process.wait(30) == 1
            assert "hash" in process.log.read_text()
    finally:
        process.process.kill()
        process.process.wait()


def test_others_than_this_machine_without_keys_are_warned_of(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key-of-sixteen-characters\n")
    for options, is_warned in ((), False), (("--api-key-file", str(tmp_path / "keys"), "--host", "0.0.0.0"), False):
        assert is_warned_of(tiny_bundle, tmp_path / "log", *options) is is_warned
    assert is_warned_of(tiny_bundle, tmp_path / "log", "--host", "0.0.0.0")


def is_warned_of(bundle: Path, log: Path, *options: str) -> bool:
    process = Process(bundle, log, *options)
    try:
        assert eventually(lambda: "Started server" in log.read_text(), 30), log.read_text()
    finally:
        process.process.kill()
        process.process.wait()
    return "others than this machine can ask" in log.read_text()


def test_more_idle_connections_than_descriptors_and_others_are_answered_and_the_log_stays_small(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    process = Process(tiny_bundle, tmp_path / "log", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160)))
    try:
        assert eventually(process.is_ready, 30), process.log.read_text()
        port = int(process.url.rpartition(":")[2])
        with ExitStack() as held:
            for number in range(400):
                connection = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" if number % 2 else b"")
            before = process.log.stat().st_size
            assert [process.ask(max_tokens=4).status_code for _ in range(5)] == [200] * 5
            assert process.log.stat().st_size - before < 5 * 1000
        assert process.log.stat().st_size < 10_000, process.log.read_text()
        assert "could not be taken" not in process.log.read_text()
    finally:
        process.process.kill()
        process.process.wait()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="another process's limits are Linux's to set")
def test_a_server_that_runs_out_of_descriptors_all_the_same_answers_and_says_so_once(process: Process) -> None:
    number = process.process.pid
    allowed = len(list(Path(f"/proc/{number}/fd").iterdir())) + 10
    resource.prlimit(number, resource.RLIMIT_NOFILE, (allowed, allowed))
    port = int(process.url.rpartition(":")[2])
    with ExitStack() as held:
        for _ in range(100):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        assert httpx.get(f"{process.url}/health/live", timeout=30).status_code == 200
    assert process.log.read_text().count("could not be taken") == 1

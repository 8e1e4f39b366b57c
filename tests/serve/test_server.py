"""The process itself: `motrt serve`, and how it ends."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from motrt.tests.serve.served import ASK, eventually


class Process:
    """`motrt serve` on a free port, with its log in a file."""

    def __init__(self, bundle: Path, log: Path, *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "motrt", "serve", str(bundle), "--port", "0", "--threads", "1", "--model-name", "tiny"]
        with log.open("w") as out:
            self.process = subprocess.Popen([*command, *options], stderr=out)

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

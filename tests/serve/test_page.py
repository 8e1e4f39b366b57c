"""The page in a real browser: tokens stream in, the batch is drawn, and nothing but the page's own script runs."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from motrt.runtime.engine import Engine
from motrt.serve.page import BODY, SCRIPT, page
from motrt.tests.serve.served import Serve, Served, eventually

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The protocol wants descriptors 3 and 4, whatever numbers the pipes have here.
LAUNCH = """
import os, sys
kept = [os.dup(int(one)) for one in sys.argv[1:3]]
while min(kept) < 5:
    kept = [os.dup(one) for one in kept]
os.dup2(kept[0], 3), os.dup2(kept[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


class Browser:
    """Chromium's DevTools protocol over a pair of pipes: JSON, a zero byte after each message."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._number, self._held = reads, writes, 0, b""
        self.said: list[str] = []  # what the page logs, and what its policy refuses
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for name in ("Page.enable", "Runtime.enable", "Log.enable"):
            self.call(name)

    session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def open(self, url: str, width: int = 1200, height: int = 800) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def becomes(self, expression: str, seconds: float = 20) -> bool:
        return eventually(lambda: bool(self.value(expression)), seconds)

    def screenshot(self, file: Path) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            piece = os.read(self._reads, 1 << 16)
            assert piece, "the browser ended"
            self._held += piece
        one, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(one)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.said.append(json.dumps(event["params"]))


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    to_read, writes = os.pipe()
    reads, to_write = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
    launched = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), str(CHROMIUM), *options]
    process = subprocess.Popen(launched, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(to_write)
    try:
        yield Browser(reads, writes)
    finally:
        process.terminate()
        process.wait(20)
        os.close(reads)
        os.close(writes)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("profile")) as one:
        yield one


DONE = "[...document.querySelectorAll('.answer header p')].filter(p => p.textContent.startsWith('done')).length"


def open_page(browser: Browser, served: Served) -> None:
    """Until the page knows what the server has."""
    browser.open(served.url)
    assert browser.becomes("document.querySelectorAll('#kinds input').length === 3")


@needs_browser
def test_four_answers_stream_in_and_the_batch_is_drawn(
    serve: Serve, slowly: Callable[[Engine, float], None], browser: Browser
) -> None:
    with serve(max_batch=4) as served:
        slowly(served.engine, 0.03)
        browser.said.clear()
        browser.open(f"{served.url}/#demo")
        assert browser.becomes("document.querySelectorAll('#slots .runs').length > 1")
        assert browser.becomes("document.querySelectorAll('.ids .m0').length > 0")
        assert browser.becomes(f"{DONE} === 4", 60)
        ids = browser.value("[...document.querySelectorAll('.answer')].map(a => a.querySelectorAll('.ids span').length)")
        assert ids == [48] * 4  # 24 of text, 6 frames of 4 codes
        assert browser.value("document.querySelectorAll('.ids .m1').length") == 4 * 24
        assert browser.value("[...document.querySelectorAll('canvas')].map(c => c.width)") == [6 * 11] * 4
        assert browser.becomes("document.querySelectorAll('#slots i:not([class=\"\"])').length === 0")
        assert browser.said == []


@needs_browser
def test_what_streams_in_is_what_the_server_says_alone(serve: Serve, browser: Browser) -> None:
    with serve() as served:
        open_page(browser, served)
        browser.value("at('temperature').value = '0'; at('most').value = '8'; at('schedule').value = 'text:4,audio:1f'")
        browser.value("at('one').click()")
        assert browser.becomes(f"{DONE} === 1")
        found = browser.value("[...document.querySelectorAll('.ids span')].map(s => Number(s.textContent))")
        alone = served.ask(model="tiny", prompt=[1, 2, 3], schedule="text:4,audio:1f").json()
        assert found == alone["choices"][0]["token_ids"]


@needs_browser
def test_stop_frees_the_rows(serve: Serve, slowly: Callable[[Engine, float], None], browser: Browser) -> None:
    with serve() as served:
        slowly(served.engine, 0.1)
        open_page(browser, served)
        browser.value("at('four').click()")
        assert eventually(lambda: served.engine.state().running == 4)
        assert browser.becomes("!at('stop').disabled")
        browser.value("at('stop').click()")
        assert eventually(lambda: served.engine.state().running == 0)
        stopped = "[...document.querySelectorAll('.answer header p')].filter(p => p.textContent.startsWith('stopped')).length"
        assert browser.becomes(f"{stopped} === 4")


@needs_browser
def test_an_error_is_shown_as_a_sentence_and_markup_in_it_stays_text(serve: Serve, browser: Browser) -> None:
    with serve() as served:
        open_page(browser, served)
        browser.value("at('schedule').value = '<img src=x onerror=alert(1)>:3'; at('one').click()")
        assert browser.becomes("at('said').classList.contains('fault')")
        assert "<img" in browser.value("at('said').textContent") or browser.value("at('said').textContent").endswith(".")
        assert browser.value("document.querySelectorAll('img').length") == 0
        browser.value("at('schedule').value = ''; at('prompt').value = 'words'; at('one').click()")
        assert "no tokenizer" in browser.value("at('said').textContent")


@needs_browser
def test_a_prompt_may_be_text_and_text_is_read_where_there_is_a_tokenizer(serve: Serve, browser: Browser) -> None:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with serve() as served:
        served.engine.session.tokenizer = words
        open_page(browser, served)
        browser.value("at('prompt').value = 'w7 w8 w9'; at('temperature').value = '0'; at('schedule').value = 'text:4'")
        browser.value("at('one').click()")
        assert browser.becomes(f"{DONE} === 1")
        shown = browser.value("document.querySelector('.answer .text').textContent")
        assert shown.startswith("w") and shown == served.ask(prompt="w7 w8 w9", schedule="text:4").json()["choices"][0]["text"]


@needs_browser
@pytest.mark.parametrize("width", [360, 800, 1200])
def test_nothing_is_wider_than_the_screen(serve: Serve, browser: Browser, width: int) -> None:
    with serve() as served:
        browser.open(f"{served.url}/#demo", width)
        assert browser.becomes(f"{DONE} === 4", 60)
        assert browser.value("document.documentElement.scrollWidth") <= width


def test_the_page_takes_nothing_from_elsewhere_and_makes_no_markup_of_what_it_hears() -> None:
    whole = page()
    assert not re.search(r"https?://|//[a-z]|@import|url\(", whole.replace("// ", ""))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "sessionStorage"):
        assert way not in SCRIPT
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', whole)
    assert policy and "unsafe" not in policy[1] and "default-src 'none'" in policy[1]


def test_the_page_asks_beside_itself_whatever_path_it_lies_under() -> None:
    assert re.findall(r"fetch\(([^,]*),", SCRIPT) == ['"v1/engine"', '"v1/completions"']


def test_every_field_has_a_label_and_no_attribute_holds_style_or_script() -> None:
    for name in re.findall(r'<(?:input|textarea) id="(\w+)"', BODY):
        assert f'<label for="{name}">' in BODY
    assert not re.search(r"\s(style|on\w+)=", BODY)

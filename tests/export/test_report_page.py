"""The page of a parity report: what is on it, that nothing breaks it, and that a browser shows it without a sideways scroll."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motrt.errors import InputError
from motrt.export.report_charts import MOST_DOTS
from motrt.export.report_page import check_writable, report_page, write_report
from motrt.export.svg_charts import LogScale, with_room

Report = dict[str, Any]

PHASES = ("prefill", "chunked prefill", "change-over", "early decode", "late decode")
LIMIT = 1.34e-5
NUM_LAYERS, NUM_PLACES, NUM_OBSERVED = 16, 60, 1500
FAULTY_LAYER = 7

HOSTILE = "<script>alert('\"&')</script>\u202e\x1b[31m"

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def a_report(is_right: bool = True) -> Report:
    """A report as the gate makes it, of a model of 16 layers; or of one whose audio expert of layer 7 is wrong."""
    chance = Random(0)
    positions = _positions(chance, is_right)
    return {
        "schema": "motrt.parity/2",
        "verdict": "PASS" if is_right else "FAIL",
        "bundle": "bundles/small-fp32",
        "backend": "onnxruntime 1.25.0, CPU, fp32",
        "reference": "PyTorch 2.11.0, fp32",
        "seconds": 437.2,
        "files": {"model.onnx": "0b5d" * 16, "model.onnx.data": "9e41" * 16, "decode.text.onnx": "77af" * 16},
        "findings": _findings(positions, is_right),
        "notes": ["onnxruntime 1.25.0 runs here; the bundle was made and examined with 1.24.2."],
        "environment": {"python": "3.11.7", "numpy": "2.4.6", "onnxruntime": "1.25.0", "torch": "2.11.0", "opset": "24"},
        "made_with": {"python": "3.11.7", "numpy": "2.4.6", "onnxruntime": "1.24.2", "torch": "2.11.0", "onnx": "1.20.0"},
        "positions": positions,
        "limit": LIMIT,
        "explanation": [
            "limit = 4 * unit roundoff * sqrt(12 * layers + 4) * accumulation",
            "unit roundoff of fp32: 2^-24; 16 layers; accumulation 4",
        ],
        "drift": _drift(chance, is_right),
        "greedy": [_plan("after a prompt of text", 32 if is_right else 11), _plan("after a prompt of audio", 32)],
        "bisect": None if is_right else _bisected(),
    }


def _positions(chance: Random, is_right: bool) -> list[Report]:
    scenarios = ("text alone", "audio alone", "runs, in order", "runs, in chunks", "ragged mixed batch")
    made = []
    for number in range(NUM_OBSERVED):
        predicted = "audio" if number // 5 % 2 else "text"
        is_wrong = not is_right and predicted == "audio"
        error = chance.lognormvariate(0, 0.35) * (4e-3 if is_wrong else 8e-7)
        margin, largest = chance.expovariate(1 / 0.4), error * 9
        made.append(
            {
                "graph": "model",
                "scenario": scenarios[number * len(scenarios) // NUM_OBSERVED],
                "row": number // 48 % 4,
                "position": number % 48,
                "predicted": predicted,
                "phase": PHASES[number % 5],
                "relative_l2": error,
                "max_abs": largest,
                "kl": error**2,
                "margin": margin,
                "same_top_1": margin > largest * 0.7,
            }
        )
    return made


def _findings(positions: list[Report], is_right: bool) -> list[Report]:
    made = [
        _finding("P1", "graph keeps the contract", "PASS"),
        _finding("P1", "every weight is in the graph and read", "PASS"),
        _finding("P1", "the graph's weights equals the checkpoint's, bit for bit", "PASS", weights=211),
        _finding("P1", "graph keeps the contract", "PASS", graph="decode.text"),
        _finding("P2", "prefill in chunks equals one pass", "PASS", positions=96, relative_l2_max=4.1e-7, limit=LIMIT),
        _finding("P2", "rows of a batch do not see each other", "PASS", positions=96, relative_l2_max=0.0, limit=LIMIT),
        _finding("P3", "swapped experts answer each other", "SKIPPED", "the experts of text and audio differ in kind or size"),
        _finding("P3", "text alone never reads another modality's weights", "PASS", poisoned=96),
    ]
    for graph in ("model", "decode.text"):
        for predicted in ("text", "audio") if graph == "model" else ("text",):
            made += [_agreement(positions, predicted, phase, graph, is_right) for phase in PHASES]
    made.append(_finding("P4", "it did the passes that it is there for", "PASS", graph="decode.text", positions=412))
    made.append(_finding("P5", "greedy tokens agree after a prompt of audio", "PASS", tokens=32, matched=32, noise=2e-6))
    if is_right:
        made.append(_finding("P5", "greedy tokens agree after a prompt of text", "PASS", tokens=32, matched=32, noise=2e-6))
    else:
        detail = "differs from token 11 on: 4711 expected with a margin of 0.412"
        made.append(_finding("P5", "greedy tokens agree after a prompt of text", "FAIL", detail, matched=11, margin=0.412))
    figures: Report = {
        "rows": 192,
        "kl_mean": 0.035,
        "kl_max": 0.21,
        "kl_limit": 0.5,
        "top_1_agreement": 0.63,
        "perplexity_ratio": 1.04,
    }
    return [*made, _finding("loss", "text: quantisation loses little", "PASS", **figures)]


def _agreement(positions: list[Report], predicted: str, phase: str, graph: str, is_right: bool) -> Report:
    there = [one for one in positions if (one["predicted"], one["phase"]) == (predicted, phase)]
    worst = max(there, key=lambda one: float(one["relative_l2"]))
    is_wrong = not is_right and predicted == "audio"
    detail = f"relative L2 {worst['relative_l2']:.3g} over {LIMIT:.3g}, in '{worst['scenario']}', row 1, position 9"
    return _finding(
        "P4",
        f"{predicted}, {phase}",
        "FAIL" if is_wrong else "PASS",
        detail if is_wrong else "",
        graph,
        rows=len(there),
        relative_l2_max=worst["relative_l2"],
        relative_l2_p95=worst["relative_l2"] * 0.7,
        max_abs=worst["max_abs"],
        mean_abs=worst["max_abs"] / 4,
        cosine_min=0.9999999,
        sqnr_db_min=48.2 if is_wrong else 117.5,
        kl_max=worst["kl"],
        top_1_agreement=0.987 if is_wrong else 1.0,
        stable_top_1_agreement=1.0,
        top_k_overlap_min=0.9,
        limit=LIMIT,
        noise=2.1e-6,
    )


def _finding(rung: str, question: str, outcome: str, detail: str = "", graph: str = "model", **figures: Any) -> Report:
    return {"rung": rung, "graph": graph, "question": question, "outcome": outcome, "detail": detail, "figures": figures}


def _drift(chance: Random, is_right: bool) -> Report:
    layers = ["embedding", *(f"layer {number}" for number in range(NUM_LAYERS)), "final norm"]
    positions = [
        {
            "row": number // 36,
            "position": number % 36,
            "modality": "audio" if number // 5 % 2 else "text",
            "phase": "change-over" if number % 5 == 4 else "prefill" if number % 36 < 16 else PHASES[3 + (number % 36 > 24)],
        }
        for number in range(NUM_PLACES)
    ]
    lines = [[0.0] * NUM_PLACES]
    for depth in range(1, len(layers)):
        is_wrong = not is_right and depth > FAULTY_LAYER
        size = 1.2e-7 * depth**0.6
        faults = (
            [3e-3 * depth**0.2 if one["modality"] == "audio" else 6e-5 for one in positions]
            if is_wrong
            else [size] * NUM_PLACES
        )
        lines.append([fault * chance.lognormvariate(0, 0.25) for fault in faults])
    return {"layers": layers, "positions": positions, "relative_l2": lines}


def _plan(name: str, matched: int) -> Report:
    expected = [4700 + number for number in range(32)]
    came = [token if at < matched else token - 77 for at, token in enumerate(expected)]
    modalities = ["audio" if at // 8 % 2 else "text" for at in range(32)]
    margins = [0.4 + at / 1000 for at in range(32)]
    return {"plan": name, "expected": expected, "came": came, "modalities": modalities, "margins": margins, "matched": matched}


def _bisected() -> Report:
    parts = [
        {"layer": f"layer {layer}", "part": part, "error": 3e-3 if (layer, part) == (7, "expert") else 2e-7, "budget": 2.4e-6}
        for layer in (6, 7, 8)
        for part in ("attention", "expert")
    ]
    return {"first": parts[3], "parts": parts, "folder": "bisect/parts"}


class Read(HTMLParser):
    """A page as a browser would take it apart; elements that are not closed, or not in their turn, are refused."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def titles(self) -> list[str]:
        return [text for tag, text in self.texts if tag == "h2"]

    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def count(page: str, pattern: str) -> int:
    return len(re.findall(pattern, page))


SECTIONS = ["Agreement", "Findings", "Drift", "Margins", "Generation", "Bisection", "Environment", "Files"]


def test_everything_that_a_report_holds_is_on_its_page_the_verdict_first() -> None:
    read = Read(report_page(a_report(is_right=False)))
    assert read.titles() == ["Notes", *SECTIONS]
    first = read.text().split()[:8]
    assert "FAIL" in first and read.elements[0][0] == "html"
    said = read.text()
    for words in (
        "does not compute what",
        "PyTorch 2.11.0, fp32",
        "7 minutes",
        "layer 7, expert: an error of 3e-3",
        "0b5d" * 16,
    ):
        assert words in said


def test_the_three_verdicts_say_different_things() -> None:
    report = a_report()
    assert "none of them failed" in Read(report_page(report)).text()
    report["findings"][0]["outcome"] = report["verdict"] = "AMBIGUOUS"
    assert "near-ties that noise may decide: 1 of 27 questions" in Read(report_page(report)).text()


def test_a_format_that_loses_too_much_is_not_said_to_compute_something_else() -> None:
    report = a_report()
    report["findings"][-1]["outcome"], report["loss"] = "FAIL", "over"
    assert report["findings"][-1]["rung"] == "loss"
    said = Read(report_page(report)).text()
    assert "loses more of the model than its budget" in said and "does not compute" not in said
    assert "than its budget" not in Read(report_page({**report, "loss": "within"})).text()


@pytest.mark.parametrize("empty", [None, {}, "missing"])
@pytest.mark.parametrize(
    ("keys", "section"),
    [
        (("notes",), "Notes"),
        (("drift",), "Drift"),
        (("positions",), "Margins"),
        (("greedy",), "Generation"),
        (("bisect",), "Bisection"),
        (("environment", "made_with"), "Environment"),
        (("files",), "Files"),
    ],
)
def test_what_a_report_does_not_hold_is_left_out(keys: tuple[str, ...], section: str, empty: Any) -> None:
    report = a_report(is_right=False)
    for key in keys:
        report[key] = empty
        if empty == "missing":
            del report[key]
    read = Read(report_page(report))
    assert read.titles() == [title for title in ["Notes", *SECTIONS] if title != section]
    assert f"#{section.lower()}" not in [attributes.get("href") for _, attributes in read.elements]


def test_the_first_group_alone_makes_a_page() -> None:
    report = {"verdict": "PASS", "backend": "b", "reference": "r", "seconds": 1.0, "files": {}, "findings": []}
    read = Read(report_page(report))
    assert read.titles() == [] and "0 questions" in read.text()
    report["findings"] = [_finding("P1", "graph keeps the contract", "PASS")]
    assert Read(report_page(report)).titles() == ["Findings"]


def test_what_failed_stands_before_what_passed_and_what_passed_is_folded() -> None:
    page = report_page(a_report(is_right=False))
    section = page[page.index('<section id="findings">') : page.index('<section id="drift">')]
    assert section.index("<b>P5</b>") < section.index("<b>P1</b>") < section.index("<b>P2</b>") < section.index("<b>loss</b>")
    folded = "".join(re.findall("<details.*?</details>", section, re.DOTALL))
    assert "✓" in folded and "✕" not in folded
    assert "✓" not in re.sub("<details.*?</details>", "", section, flags=re.DOTALL)


def test_a_derived_graph_is_folded_while_all_is_well_with_it() -> None:
    report = a_report()
    assert "<details><summary>Graph decode.text: 5 passed" in report_page(report)
    next(one for one in report["findings"] if one["rung"] == "P4" and one["graph"] == "decode.text")["outcome"] = "FAIL"
    assert "<details open><summary>Graph decode.text: 1 failed, 4 passed" in report_page(report)


def test_what_was_run_in_another_way_has_a_table_of_its_own() -> None:
    report = a_report()
    rounded = _finding("P4", "text, prefill, activations rounded", "PASS", relative_l2_max=0.01, limit=0.25)
    report["findings"].append(rounded)
    assert "<details><summary>Graph model, activations rounded: 1 passed" in report_page(report)


def test_a_share_of_the_limit_is_a_number_and_a_bar() -> None:
    report = a_report()
    one = next(one for one in report["findings"] if one["rung"] == "P4")
    shares = {
        LIMIT / 4: ("25 %", "20"),
        LIMIT * 20: ("20 times", "100"),
        "inf": ("∞ times", "100"),
        "nan": ("NaN times", "100"),
    }
    for error, (said, length) in shares.items():
        one["figures"]["relative_l2_max"] = error
        bar, told = re.findall(
            r'<span class="share"><svg.*?width="([\d.]+)" height="8" class="tone.*?<span>(.*?)</span>', report_page(report)
        )[0]
        assert (told, bar) == (said, length)


def test_differences_of_the_environment_are_words_and_come_first() -> None:
    page = report_page(a_report())
    rows = re.findall('<tr class="differs">.*?</tr>', page)
    assert len(rows) == 1 and "1.24.2, differs" in rows[0]
    assert page.index(rows[0]) < page.index('<th scope="row">numpy</th>')


def test_a_first_difference_is_marked_and_what_follows_is_not_compared() -> None:
    page = report_page(a_report(is_right=False))
    section = page[page.index('<section id="generation">') : page.index('<section id="bisection">')]
    strips = re.findall('<svg class="chart.*?</svg>', section, re.DOTALL)
    assert [count(strip, 'class="broken"') for strip in strips] == [1, 0]
    assert [count(strip, 'class="unasked"') for strip in strips] == [20, 0]
    assert [count(strip, 'class="m[01]"') for strip in strips] == [11, 32]
    assert "token 11, audio is the first that differs: 4711 expected, by a margin of 0.411; 4634 came." in Read(page).text()


def test_a_generation_that_ends_too_soon_is_told() -> None:
    report = a_report()
    report["greedy"] = [
        {"plan": "p", "expected": [1, 2, 3], "came": [1, 2], "modalities": ["text"], "margins": [], "matched": 2}
    ]
    assert "the first 2 tokens agree, then 2 came where 3 were expected" in Read(report_page(report)).text()


def test_every_chart_says_in_words_what_it_shows() -> None:
    read = Read(report_page(a_report(is_right=False)))
    charts = [attributes for tag, attributes in read.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(charts) == 5
    names = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(names) == len(set(names))
    for chart in charts:
        assert chart["role"] == "img" and {chart["aria-labelledby"], chart["aria-describedby"]} <= set(names)
    words = [text for tag, text in read.texts if tag == "desc"]
    assert len(words) == 5 and all(len(text) >= 20 for text in words)
    assert "First over the limit of 1.3e-5: layer 7, at 60 of 60 positions." in words[0]


def every_string_replaced(value: Any, by: str) -> Any:
    if isinstance(value, dict):
        return {key if key in KEYS else f"{key}{by}": every_string_replaced(one, by) for key, one in value.items()}
    if isinstance(value, list):
        return [every_string_replaced(one, by) for one in value]
    return f"{value}{by}" if isinstance(value, str) else value


def keys_of(value: Any) -> set[str]:
    """The keys that the schema gives, not those that are names of something."""
    if isinstance(value, dict):
        free = {"files", "environment", "made_with"}
        return set(value) | {key for name, one in value.items() if name not in free for key in keys_of(one)}
    return {key for one in value for key in keys_of(one)} if isinstance(value, list) else set()


KEYS = keys_of(a_report(is_right=False))


def test_nothing_that_stands_in_a_report_becomes_markup() -> None:
    harmless = Read(report_page(a_report(is_right=False)))
    report = every_string_replaced(a_report(is_right=False), HOSTILE)
    for one, right in zip(report["findings"], a_report(is_right=False)["findings"], strict=True):
        one["outcome"] = right["outcome"]
        one["figures"][HOSTILE] = HOSTILE
    page = report_page(report)
    read = Read(page)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert {tag for tag, _ in read.elements} == {tag for tag, _ in harmless.elements}
    allowed = {name for _, attributes in harmless.elements for name in attributes}
    assert {name for _, attributes in read.elements for name in attributes} <= allowed
    assert read.text().count("<script>alert('\"&')</script>") > 100
    report["findings"][0]["outcome"] = report["findings"][0]["rung"] = HOSTILE
    assert "<script" not in report_page(report)


@pytest.mark.parametrize("is_right", [True, False])
def test_a_page_refers_to_nothing_outside_itself(is_right: bool) -> None:
    page = report_page(a_report(is_right))
    for pattern in (r"https?:", "src=", "<script", "@import", r"url\(", "<link", r"\bon\w+=", "<base", "<iframe"):
        assert not re.search(pattern, page), pattern
    targets = {attributes["href"] for _, attributes in Read(page).elements if "href" in attributes}
    assert targets == {f"#{title.lower()}" for title in Read(page).titles() if title != "Notes"}
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def with_odd_numbers(value: Any, chance: Random) -> Any:
    """Every third float is no number, infinite, zero, or its string, as a report in JSON has it."""
    if isinstance(value, dict):
        return {key: with_odd_numbers(one, chance) for key, one in value.items()}
    if isinstance(value, list):
        return [with_odd_numbers(one, chance) for one in value]
    odd = (inf, nan, "inf", "-inf", "nan", 0.0, -1.0, 1e308, 5e-324)
    return chance.choice(odd) if isinstance(value, float) and chance.random() < 0.3 else value


@pytest.mark.parametrize("seed", range(5))
def test_values_that_are_no_numbers_break_nothing(seed: int) -> None:
    page = report_page(with_odd_numbers(a_report(is_right=bool(seed % 2)), Random(seed)))
    read = Read(page)
    drawn = [
        value for tag, attributes in read.elements for value in attributes.values() if tag in ("rect", "circle", "line", "path")
    ]
    assert not [value for value in drawn if value and re.search("nan|inf", value)]
    assert "infinite or no number" in read.text()


@pytest.mark.parametrize("value", ["inf", "nan", 0.0])
def test_a_report_of_nothing_but_such_values_has_its_page(value: Any) -> None:
    report = a_report()
    report["limit"] = value
    report["drift"]["relative_l2"] = [[value] * NUM_PLACES for _ in report["drift"]["layers"]]
    for one in report["positions"]:
        one.update(relative_l2=value, max_abs=value, kl=value, margin=value)
    assert Read(report_page(report)).titles() == ["Notes", *(title for title in SECTIONS if title != "Bisection")]


def many_positions(number: int, is_right: bool) -> list[Report]:
    once = a_report(is_right)["positions"]
    chance = Random(1)
    return [
        {**once[at % len(once)], "max_abs": chance.lognormvariate(-11, 0.6), "margin": chance.expovariate(2)}
        for at in range(number)
    ]


def marks_of(page: str) -> str:
    section = page[page.index('<section id="margins">') :]
    return section[section.index('<svg class="chart"') : section.index("</section>")].partition("</svg>")[0]


def test_of_many_positions_that_pass_some_are_drawn_and_all_that_stand_out() -> None:
    report = a_report()
    report["positions"] = many_positions(6000, is_right=True)
    for number in range(0, 4000, 100):
        report["positions"][number]["same_top_1"] = False
    page = report_page(report)
    drawn = count(marks_of(page), "<circle")
    assert 300 < drawn <= MOST_DOTS
    assert count(marks_of(page), '<path d="[^"]*"/?>') - 1 + count(marks_of(page), "<path><title>") <= 41
    assert count(marks_of(page), "<title>[^<]*: error ") == 40
    assert f"Of 6,000 positions {drawn + 40:,} are drawn" in Read(page).text()
    assert page == report_page(report)


def test_few_positions_are_all_drawn() -> None:
    page = report_page(a_report())
    assert count(marks_of(page), "<circle") == NUM_OBSERVED
    assert "are drawn" not in Read(page).text()


@pytest.mark.parametrize("is_right", [True, False])
def test_a_large_model_and_thousands_of_positions_make_no_large_page(is_right: bool) -> None:
    report = a_report(is_right)
    report["positions"] = many_positions(6000, is_right)
    layers, places = 100, 1000
    report["drift"] = {
        "layers": [f"layer {number}" for number in range(layers)],
        "positions": [report["drift"]["positions"][at % NUM_PLACES] for at in range(places)],
        "relative_l2": [[1e-7 * (layer + 1) for _ in range(places)] for layer in range(layers)],
    }
    page = report_page(report)
    assert len(page.encode()) < 1_500_000
    assert "A column is the worst of 25 neighbouring positions." in Read(page).text()


def test_a_column_of_many_positions_shows_their_worst() -> None:
    report = a_report()
    count_there = 600
    report["drift"]["positions"] = [report["drift"]["positions"][0]] * count_there
    report["drift"]["relative_l2"] = [[1e-7] * count_there for _ in report["drift"]["layers"]]
    report["drift"]["relative_l2"][3][333] = "nan"
    page = report_page(report)
    section = page[page.index('<section id="drift">') : page.index('<section id="margins">')]
    assert count(section, 'class="broken"><title>2, row') == 1


def test_the_same_report_makes_the_same_page() -> None:
    assert report_page(a_report()) == report_page(json.loads(json.dumps(a_report())))


def test_a_report_is_written_as_values_and_as_a_page_and_replaced_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_report(a_report(is_right=False), folder)
    write_report(a_report(), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    text = (folder / "report.json").read_text()
    assert json.loads(text) == a_report() and text.startswith('{\n "schema"')
    assert (folder / "report.html").read_text(encoding="utf-8") == report_page(a_report())


def test_what_json_has_no_word_for_is_written_as_its_name(tmp_path: Path) -> None:
    report = {**a_report(), "limit": nan, "seconds": -inf, "notes": ("a name that is no Unicode: \udcff",)}
    write_report(report, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (read["limit"], read["seconds"], len(read["notes"])) == ("nan", "-inf", 1)
    assert "no Unicode: \\xdcff" in (tmp_path / "report.html").read_text(encoding="utf-8")


Refused = Callable[[Path], None]


@pytest.fixture(params=["check", "write"])
def refused(request: pytest.FixtureRequest) -> Refused:
    return check_writable if request.param == "check" else lambda folder: write_report(a_report(), folder)


def test_a_file_is_no_folder_for_a_report(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"file is a file, and a folder for the report was expected: name a folder"):
        refused(tmp_path / "file")
    with pytest.raises(InputError, match=r"below can not be made \(.*\): name a folder for the report that can be"):
        refused(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def test_a_name_that_is_none_is_refused(tmp_path: Path, refused: Refused) -> None:
    with pytest.raises(InputError, match="can not be made"):
        refused(tmp_path / "a\0b")
    with pytest.raises(InputError, match="can not be made"):
        refused(tmp_path / ("x" * 5000))


def test_a_link_to_nowhere_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "further")
    with pytest.raises(InputError, match="can not be made"):
        refused(tmp_path / "link")


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_folder_where_a_file_of_the_report_goes_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} is a folder, and the report's file goes there: remove it"):
        refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(InputError, match="closed can not be written"):
        refused(folder)
    with pytest.raises(InputError, match="below can not be made"):
        refused(folder / "below")
    folder.chmod(0o000)
    with pytest.raises(InputError, match="closed can not be written"):
        refused(folder)
    folder.chmod(0o700)


def test_a_folder_that_turns_out_not_to_be_written_is_refused(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(InputError, match=r"can not be written \(.*Read-only file system\): mend that, or name another folder"):
        refused(tmp_path)


def test_asking_whether_a_folder_can_be_written_leaves_nothing_in_it(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    write_report(a_report(), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    check_writable(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_disk_that_fills_while_a_report_is_written_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(a_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(a_report(is_right=False), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# Asked inside frames of a page of our own: the product has no script. What leaves the screen may do so in its own box alone.
MEASURE = """
<script>
function measure(frame) {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  const boxes = (selector) => [...page.querySelectorAll(selector)].map((one) => one.getBoundingClientRect());
  const outside = (box) => box.left < -0.5 || box.right > width + 0.5;
  const touching = [...page.querySelectorAll('svg.chart')].map((chart) => {
    const letters = [...chart.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
    return letters.flatMap(([text, a], at) => letters.slice(at + 1)
      .filter(([_, b]) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
      .map(([other]) => text + ' / ' + other));
  }).flat();
  return {
    width, scroll: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
    charts: boxes('svg.chart').filter((box) => box.width > 200 && box.height > 20).length,
    outside: boxes('h1, h2, h3, p, li, figure, .scroll, svg.chart, svg.chart text').filter(outside).length,
    touching,
  };
}
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map(measure);
  document.getElementById('found').textContent = JSON.stringify(found);
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome to show a page")
def test_a_browser_shows_it_on_a_phone_and_on_a_desk_without_a_sideways_scroll(tmp_path: Path) -> None:
    long_named = a_report(is_right=False)
    long_named.update(bundle="a/very/long/name" * 30, notes=["x" * 500])
    long_named["findings"][0].update(outcome="FAIL", question="q" * 300, detail="d" * 300)
    pages = [report_page(one) for one in (a_report(), a_report(is_right=False), long_named)]
    frames = [
        f'<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{escape(page)}"></iframe>'
        for page in pages
        for width in (320, 360, 768, 1200)
    ]
    asking = tmp_path / "asking.html"
    asking.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{MEASURE}<pre id="found"></pre>{"".join(frames)}', encoding="utf-8"
    )
    options = [
        "--headless",
        "--hide-scrollbars",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(BROWSER), *options, "--window-size=1300,1000", "--dump-dom", asking.as_uri()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300)
    answer = re.search('<pre id="found">(.*?)</pre>', told.stdout, re.DOTALL)
    assert answer is not None and answer[1], told.stderr
    measured = json.loads(unescape(answer[1]))
    assert [one["width"] for one in measured] == [320, 360, 768, 1200] * 3
    for one, charts in zip(measured, [5] * 12, strict=True):
        assert (one["scroll"], one["outside"], one["touching"]) == (one["width"], 0, [])
        assert one["charts"] == charts and one["height"] > 2000


@given(st.lists(st.floats()), st.floats(), st.booleans())
def test_a_scale_keeps_every_number_between_its_ends(values: list[float], value: float, is_whole: bool) -> None:
    scale = LogScale.over(values, 10.0, 110.0, is_whole)
    assert 10.0 <= scale.at(value) <= 110.0
    ticks = scale.ticks()
    assert ticks == sorted(ticks) and 1 <= len(ticks) <= 9
    if len(ticks) > 1:
        assert all(scale.low * 0.99 <= tick <= scale.high * 1.01 for tick in ticks)


def test_a_scale_is_even_in_decades() -> None:
    scale = LogScale.over([2e-7, 3e-4, inf, 0.0, nan], 0.0, 4.0)
    assert [scale.low, scale.high] == pytest.approx([1e-7, 1e-3])
    places = (1e-6, 1e-5, 0.0, -1.0, inf, nan, 1e9)
    assert [scale.at(value) for value in places] == pytest.approx([1, 2, 0, 0, 4, 4, 4])


def test_labels_never_touch_and_numbers_are_multiples() -> None:
    labels = ["embedding", *map(str, range(40)), "final norm"]
    places = [14.0 * at for at in range(len(labels))]
    kept = with_room(labels, places, [20.0] * len(labels))
    assert [labels[at] for at in kept] == ["embedding", *map(str, range(2, 39, 2)), "final norm"]
    assert with_room(["a" * 9, "b" * 9], [0.0, 1.0], [90.0, 90.0]) == [0]
    assert with_room([], [], []) == []

"""A parity report as one page that anybody can open: no script, nothing from elsewhere, fit for a phone, paper and the dark.

``report_page`` makes the page from the report's plain values; ``write_report`` lays it and the values themselves into a folder.
What a report has no values for is left out. It climbs nothing and judges nothing: every outcome was decided before.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite, nan
from pathlib import Path
from typing import Any

from motrt.errors import InputError
from motrt.export.html_parts import NOTHING, Html, counted, folded, joined, number, percent, row, shown, table, tag
from motrt.export.page_style import STYLE
from motrt.export.report_charts import drift_curves, drift_map, greedy, margins, modality_kinds
from motrt.export.svg_charts import bar

Report = Mapping[str, Any]

JSON_NAME, PAGE_NAME = "report.json", "report.html"

SIGNS = {"FAIL": "✕", "AMBIGUOUS": "≈", "SKIPPED": "○", "PASS": "✓"}
SAID = {"FAIL": "failed", "AMBIGUOUS": "ambiguous", "SKIPPED": "skipped", "PASS": "passed"}

RUNGS = {
    "P1": "contract and weights",
    "P2": "self-consistency",
    "P3": "routing laws",
    "P4": "agreement with the reference",
    "P5": "generation",
    "loss": "what quantisation loses",
}

# Of the figures of a P4 finding: what it is called, and how it is written.
AGREEMENT = {
    "rows": ("rows>", shown),
    "relative_l2_max": ("worst relative L2>", shown),
    "limit": ("its limit>", shown),
    "limit_median": ("median limit>", shown),
    "relative_l2_p95": ("95 % below>", shown),
    "max_abs": ("max abs (logits)>", shown),
    "kl_max": ("worst KL (nats)>", shown),
    "sqnr_db_min": ("least SQNR (dB)>", shown),
    "top_1_agreement": ("same best id>", lambda share: percent(number(share))),
    "stable_top_1_agreement": ("same, no near-tie>", lambda share: percent(number(share))),
}

SHARES = {"top_1_agreement", "stable_top_1_agreement", "top_k_overlap_min"}
FIGURES = {
    "relative_l2_max": "worst relative L2",
    "kl_mean": "mean KL in nats",
    "kl_max": "worst KL in nats",
    "kl_limit": "limit of the mean KL in nats",
    "top_1_agreement": "same best id",
    "perplexity_ratio": "ratio of perplexities",
}

MOST_SHOWN = 3  # of the failed findings, under the verdict

# Nothing is loaded, whatever a report may hold: the browser is told so too.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML page.

    Args:
        report: a parity report as plain JSON values, ``motrt.parity/2``; infinity and NaN as the strings ``inf`` and ``nan``.
            Everything but verdict, names and findings may be missing.

    Returns:
        The page. Every string of the report is escaped in it; the same report makes the same page.
    """
    title = f"{report['verdict']}: parity of {report.get('bundle') or report['backend']}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    parts = {name: part for name, part in _sections(report).items() if part}
    sections = [tag("section", tag("h2", name), part, id=_anchor(name)) for name, part in parts.items()]
    links = tag("nav", *(tag("a", name, href=f"#{_anchor(name)}") for name in parts), aria_label="Sections")
    body = tag("body", joined([_header(report), _notes(report), links, tag("main", joined(sections)), _footer(report)]))
    return "\n".join(("<!DOCTYPE html>", tag("html", head, "\n", body, lang="en"), ""))


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, each whole or not at all; what has their names is replaced.

    Args:
        report: as for ``report_page``.
        folder: is made where it is missing.

    Raises:
        InputError: it can not be written.
    """
    values = json.dumps(_strict(report), indent=1, allow_nan=False) + "\n"
    page = report_page(report).encode()
    check_writable(folder)
    _replace(folder / JSON_NAME, values.encode())
    _replace(folder / PAGE_NAME, page)


def check_writable(folder: Path) -> None:
    """Make ``folder`` and see that files can be written into it: asked before hours of work, not after.

    Raises:
        InputError: they can not; the message says why and what to do.
    """
    try:
        is_file = folder.is_file()
        if not is_file:
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as failure:  # a name that is too long, or that holds what no name may
        raise InputError(f"{folder} can not be made ({failure}): name a folder for the report that can be") from failure
    if is_file:
        raise InputError(f"{folder} is a file, and a folder for the report was expected: name a folder, or remove the file")
    probe = _beside(folder / JSON_NAME)
    try:
        folders = [folder / name for name in (JSON_NAME, PAGE_NAME) if (folder / name).is_dir()]
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as failure:
        raise _unwritable(folder, failure) from failure
    if folders:
        raise InputError(f"{folders[0]} is a folder, and the report's file goes there: remove it, or name another folder")


def _replace(path: Path, content: bytes) -> None:
    """Write beside, sync, move into place: whoever looks finds the old file or the new one."""
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as failure:
        raise _unwritable(path.parent, failure) from failure
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _unwritable(folder: Path, failure: OSError) -> InputError:
    return InputError(f"{folder} can not be written ({failure}): mend that, or name another folder for the report")


def _strict(value: Any) -> Any:
    """The same in what JSON has words for."""
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(one) for one in value]
    return value


def _sections(report: Report) -> dict[str, Html]:
    """Every section by its title, in the order of the page; what there is nothing for is empty."""
    kinds = modality_kinds(report)
    return {
        "Agreement": _agreement(report),
        "Findings": _other_findings(report),
        "Drift": joined([drift_map(report, kinds), drift_curves(report, kinds)]),
        "Margins": margins(report, kinds),
        "Generation": greedy(report, kinds),
        "Bisection": _bisection(report),
        "Environment": _environment(report),
        "Files": _files(report),
    }


def _anchor(name: str) -> str:
    return name.lower()


def _header(report: Report) -> Html:
    verdict = str(report["verdict"])
    counts = Counter(str(one["outcome"]) for one in report["findings"])
    word = tag("h1", tag("span", SIGNS.get(verdict, "?"), aria_hidden="true"), verdict)
    lead = tag("p", *_sentence(report, counts), class_="lead")
    chips = tag("ul", *(_chip(one, counts[one]) for one in SIGNS if counts[one]), class_="chips")
    return tag("header", word, tag("div", lead, _first_failures(report), chips), class_=f"verdict {_kind(verdict)}")


def _chip(outcome: str, count: int) -> Html:
    return tag("li", tag("span", SIGNS[outcome], aria_hidden="true"), f" {count:,} {SAID[outcome]}", class_=_kind(outcome))


def _sentence(report: Report, counts: Mapping[str, int]) -> list[object]:
    """What was compared with what, and how it ended."""
    subject: list[object] = [tag("b", report["bundle"]), ", run by "] if report.get("bundle") else []
    subject += [tag("b", report["backend"])]
    reference, asked = tag("b", report["reference"]), counted(sum(counts.values()), "question")
    ends = {
        "PASS": (" computes what ", reference, f" computes: {asked}, none of them failed."),
        "AMBIGUOUS": (
            " agrees with ",
            reference,
            f" but for near-ties that noise may decide: {counts['AMBIGUOUS']} of {asked}.",
        ),
        "FAIL": (" does not compute what ", reference, f" computes: {counts['FAIL']} of {asked} failed."),
    }
    end: tuple[object, ...] = ends.get(str(report["verdict"]), (" was compared with ", reference, f": {asked}."))
    if report.get("loss") == "over":
        end = (*end, " The format that its weights are stored in loses more of the model than its budget.")
    comma = [","] if report.get("bundle") else []
    return [*subject, *comma, *end, f" It took {_duration(number(report.get('seconds')))}."]


def _duration(seconds: float) -> str:
    if not isfinite(seconds):
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _first_failures(report: Report) -> Html:
    """What a hurried reader of a failed report wants: the first failures, and the part that bisection found."""
    failed = [one for one in report["findings"] if one["outcome"] == "FAIL"]
    lines = [tag("li", tag("b", _asked(one)), ": ", one.get("detail") or "failed") for one in failed[:MOST_SHOWN]]
    if len(failed) > MOST_SHOWN:
        lines.append(tag("li", f"and {len(failed) - MOST_SHOWN:,} more, below"))
    if found := _first_part(report):
        lines.append(tag("li", tag("b", "Where it begins"), f": {found}"))
    return tag("ul", *lines, class_="failures") if lines else NOTHING


def _asked(finding: Mapping[str, Any]) -> str:
    graph = _graph(finding)
    return f"{finding['rung']} {finding['question']}{'' if graph == 'model' else f' ({graph})'}"


def _notes(report: Report) -> Html:
    notes = [tag("li", note) for note in report.get("notes") or ()]
    return tag("aside", tag("h2", "Notes"), tag("ul", *notes), class_="notes") if notes else NOTHING


def _is_compared(finding: Mapping[str, Any]) -> bool:
    """Is it a row of the table of agreement: a modality and a kind of position, with an error?"""
    return finding["rung"] == "P4" and "relative_l2_max" in _figures(finding)


def _agreement(report: Report) -> Html:
    """P4, a table for each graph and way to run it; the model's own is open, of others those in which not all is well."""
    tables: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in filter(_is_compared, report["findings"]):
        tables.setdefault((_graph(one), _words_of_question(one)[2]), []).append(one)
    if not tables:
        return NOTHING
    reading = tag(
        "p",
        "How far the logits are from the reference's, by the modality that is predicted and the kind of position. The bar is "
        "the worst row's share of what is allowed; its upright line is the limit.",
    )
    return joined([reading, *(_agreement_table(*one) for one in tables.items()), _explanation(report)])


def _words_of_question(finding: Mapping[str, Any]) -> tuple[str, str, str]:
    """The predicted modality, the kind of position, and how the graph was run where that is not as it is."""
    predicted, positions, way = (*str(finding["question"]).split(", ", 2), "", "")[:3]
    return predicted, positions, way


def _agreement_table(which: tuple[str, str], findings: Sequence[Mapping[str, Any]]) -> Html:
    name = "Graph " + ", ".join(word for word in which if word)
    there = [key for key in AGREEMENT if any(key in _figures(one) for one in findings)]
    columns = ("predicted", "positions", "share of the limit", "outcome", *(AGREEMENT[key][0] for key in there))
    rows = [part for one in findings for part in _agreement_rows(columns, there, one)]
    made = table(name, columns, rows)
    if which == ("model", ""):
        return made
    counts = Counter(str(one["outcome"]) for one in findings)
    return folded(f"{name}: {_counts(counts)}", made, is_open=set(counts) != {"PASS"})


def _agreement_rows(columns: Sequence[str], keys: Sequence[str], finding: Mapping[str, Any]) -> list[Html]:
    figures = _figures(finding)
    predicted, positions, _ = _words_of_question(finding)
    written = [AGREEMENT[key][1](figures[key]) if key in figures else "" for key in keys]
    outcome = str(finding["outcome"])
    share = _share(figures.get("relative_l2_max"), figures.get("limit"), outcome)
    rows = [row(columns, (predicted, positions, share, _outcome(outcome), *written))]
    if finding.get("detail"):
        rows.append(tag("tr", tag("td", tag("p", finding["detail"]), colspan=len(columns)), class_=f"detail {_kind(outcome)}"))
    return rows


def _share(error: object, limit: object, outcome: str) -> Html:
    """A bar, and the number beside it."""
    allowed = number(limit)
    if not allowed > 0:
        return NOTHING
    ratio = number(error) / allowed
    said = f"{ratio * 100:.2g} %" if ratio < 0.995 else f"{ratio:,.0f} times" if 10 <= ratio < 1e6 else f"{shown(ratio)} times"
    return tag("span", bar(ratio, _kind(outcome)), tag("span", said), class_="share")


def _explanation(report: Report) -> Html:
    lines = [tag("li", line) for line in report.get("explanation") or ()]
    limit = number(report.get("limit", nan))
    which = f" of {shown(limit)}" if isfinite(limit) else ""
    return folded(f"Where the limit{which} comes from", tag("ul", *lines, class_="explanation")) if lines else NOTHING


def _other_findings(report: Report) -> Html:
    """Everything that is not in the table, by rung: rungs in which something failed come first."""
    rungs: dict[str, list[Mapping[str, Any]]] = {}
    for one in report["findings"]:
        if not _is_compared(one):
            rungs.setdefault(str(one["rung"]), []).append(one)
    order = [*RUNGS, *(name for name in rungs if name not in RUNGS)]
    sorted_rungs = sorted(rungs.items(), key=lambda one: (_worst_place(one[1]), order.index(one[0])))
    return joined(_rung(*one) for one in sorted_rungs)


def _worst_place(findings: Sequence[Mapping[str, Any]]) -> int:
    """0 where something failed, 1 where something is a near-tie, else 2."""
    outcomes = {one["outcome"] for one in findings}
    return 0 if "FAIL" in outcomes else 1 if "AMBIGUOUS" in outcomes else 2


def _rung(name: str, findings: Sequence[Mapping[str, Any]]) -> Html:
    counts = Counter(str(one["outcome"]) for one in findings)
    title = tag("h3", tag("b", name), " ", RUNGS.get(name, ""), " ", tag("small", _counts(counts)))
    if set(counts) == {"PASS"}:
        return tag("div", folded(title, tag("ul", *map(_finding, findings), class_="findings")), class_="rung")
    order = {outcome: place for place, outcome in enumerate(SIGNS)}
    remarkable = [one for one in findings if one["outcome"] != "PASS"]
    told = [_finding(one) for one in sorted(remarkable, key=lambda one: order.get(str(one["outcome"]), -1))]
    passed = [_finding(one) for one in findings if one["outcome"] == "PASS"]
    quiet = folded(f"{len(passed):,} passed", tag("ul", *passed, class_="findings")) if passed else NOTHING
    return tag("div", title, tag("ul", *told, class_="findings") if told else NOTHING, quiet, class_="rung")


def _finding(finding: Mapping[str, Any]) -> Html:
    outcome, graph = str(finding["outcome"]), _graph(finding)
    parts = [_outcome(outcome), " ", tag("span", finding["question"], class_="question")]
    parts += [] if graph == "model" else [" ", tag("span", graph, class_="graph")]
    parts += [tag("p", finding["detail"])] if finding.get("detail") else []
    figures = [
        f"{FIGURES.get(key, str(key).replace('_', ' '))} {_figure(key, value)}" for key, value in _figures(finding).items()
    ]
    parts += [tag("p", ", ".join(figures), class_="figures")] if figures else []
    return tag("li", *parts, class_=_kind(outcome))


def _figure(name: str, value: object) -> str:
    return percent(number(value)) if name in SHARES else shown(value)


def _bisection(report: Report) -> Html:
    """Which part of which layer is more wrong than it may be."""
    told = report.get("bisect") or {}
    parts = told.get("parts") or ()
    if not parts and not told.get("first"):
        return NOTHING
    found = _first_part(report) or "no part alone is more wrong than it may be."
    sentences = [tag("p", tag("b", "Where it begins"), f": {found}", class_="lead")]
    if told.get("folder"):
        sentences.append(tag("p", "Inputs and answers of the parts stand in ", tag("code", told["folder"]), "."))
    columns = ("layer", "part", "error>", "budget>", "share of the budget")
    rows = [_part(columns, one, one == told.get("first")) for one in parts]
    return joined([*sentences, table("Parts of the model", columns, rows) if rows else NOTHING])


def _first_part(report: Report) -> str:
    first = (report.get("bisect") or {}).get("first")
    if not first:
        return ""
    error, budget = (shown(first.get(name)) for name in ("error", "budget"))
    return f"{first.get('layer')}, {first.get('part')}: an error of {error} where {budget} is allowed."


def _part(columns: Sequence[str], part: Mapping[str, Any], is_first: bool) -> Html:
    error, budget = part.get("error"), part.get("budget")
    outcome = "PASS" if number(error) <= number(budget) else "FAIL"
    cells = (part.get("layer"), part.get("part"), shown(error), shown(budget), _share(error, budget, outcome))
    return row(columns, cells, "first" if is_first else None)


def _environment(report: Report) -> Html:
    """What runs here beside what the bundle was made with; what differs comes first."""
    here, there = report.get("environment") or {}, report.get("made_with") or {}
    if not here and not there:
        return NOTHING
    columns = ("name", "running", "made with")
    names = sorted({*here, *there}, key=lambda name: (not _differs(name, here, there), str(name)))
    rows = []
    for name in names:
        differs = _differs(name, here, there)
        made_with = f"{there.get(name, '—')}{', differs' if differs else ''}"
        rows.append(row(columns, (name, here.get(name, "—"), made_with), "differs" if differs else None))
    count = sum(_differs(name, here, there) for name in names)
    said = f"{counted(count, 'differs', 'differ')} from what the bundle was made with." if count else "Nothing differs."
    return joined([tag("p", said) if here and there else NOTHING, table("Environment", columns, rows)])


def _differs(name: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    return name in here and name in there and here[name] != there[name]


def _files(report: Report) -> Html:
    files = report.get("files") or {}
    if not files:
        return NOTHING
    columns = ("file", "sha256")
    rows = [row(columns, (name, tag("code", found))) for name, found in files.items()]
    return joined([tag("p", "The very files that were examined."), table("Files", columns, rows)])


def _footer(report: Report) -> Html:
    schema = report.get("schema") or "no schema"
    return tag("footer", tag("p", f"Every figure, and more, stands in {JSON_NAME} beside this page ({schema})."))


def _outcome(outcome: str) -> Html:
    sign = tag("span", SIGNS.get(outcome, "?"), aria_hidden="true")
    return tag("span", sign, " ", outcome, class_=f"outcome {_kind(outcome)}")


def _kind(outcome: str) -> str:
    """The class of an outcome; of a word that is none, none."""
    return outcome.lower() if outcome in SIGNS else "unknown"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[one]:,} {SAID[one]}" for one in SIGNS if counts.get(one))


def _graph(finding: Mapping[str, Any]) -> str:
    return str(finding.get("graph") or "model")


def _figures(finding: Mapping[str, Any]) -> Mapping[str, Any]:
    return finding.get("figures") or {}

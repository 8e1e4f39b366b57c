"""The pictures of a parity report: how an error grows through the layers, what it could overturn, where speech parts.

Each is a figure with a title, a sentence that says how to read it, what stands out in it, and its chart; where a report has no
values for one, it is nothing. It knows the report's values and neither verdicts nor the rest of the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, inf, isfinite, isnan, log10, nan
from statistics import median
from typing import Any

from motrt.export.html_parts import NOTHING, Html, counted, folded, joined, legend, number, row, shown, table, tag
from motrt.export.svg_charts import (
    Column,
    Described,
    Line,
    Mark,
    heat_map,
    line_chart,
    scatter,
    strip,
    swatch,
)

Report = Mapping[str, Any]

# Classes of the page. Text and audio have the colours of the documents, others follow.
KINDS = {"text": "m0", "audio": "m1"}
MORE_KINDS = ("m2", "m3", "m4", "m5")

SHADES = {
    "prefill": "shade1",
    "chunked prefill": "shade2",
    "early decode": "shade3",
    "late decode": "shade4",
    "change-over": "shade5",
    "after change-over": "shade6",
}

# A cell is some 130 bytes, a mark some 40, and one with a word to it 150: together a page stays below 1.5 MB.
MOST_CELLS, MOST_COLUMNS, FEWEST_COLUMNS = 4000, 120, 12
MOST_DOTS, MOST_TIPS = 1500, 300
CELLS_PER_DECADE = 24
NUM_WORST = 10

# Two logits, each wrong by the largest error: what they lead by can be overturned up to twice of it.
OVERTURNED = 0.5


def modality_kinds(report: Report) -> dict[str, str]:
    """The class of each modality that is named anywhere in the report, in the order in which they are first named."""
    named: Iterable[Any] = chain(
        (one.get("modality") for one in (report.get("drift") or {}).get("positions") or ()),
        (one.get("predicted") for one in report.get("positions") or ()),
        chain.from_iterable(one.get("modalities") or () for one in report.get("greedy") or ()),
    )
    kinds = dict(KINDS)
    for name in map(str, named):
        if name not in kinds:
            kinds[name] = MORE_KINDS[(len(kinds) - len(KINDS)) % len(MORE_KINDS)]
    return kinds


@dataclass(frozen=True)
class Drift:
    """The error of the residual stream: for each layer a value for each position; NaN has become infinity."""

    layers: tuple[str, ...]
    positions: tuple[Mapping[str, Any], ...]
    values: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, report: Report) -> "Drift | None":
        told = report.get("drift") or {}
        layers, positions = map(str, told.get("layers") or ()), tuple(told.get("positions") or ())
        lines = [tuple(_or_infinity(number(value)) for value in line) for line in told.get("relative_l2") or ()]
        pairs = list(zip(layers, lines, strict=False))
        if not pairs or not positions:
            return None
        return cls(tuple(layer for layer, _ in pairs), positions, tuple(line[: len(positions)] for _, line in pairs))

    def worst(self) -> tuple[float, str, str]:
        """The largest error, its layer, and its position in words."""
        value, layer, at = max(
            ((value, layer, at) for layer, line in enumerate(self.values) for at, value in enumerate(line)),
            key=lambda one: one[0],
            default=(nan, 0, 0),
        )
        return value, self.layers[layer], _place(self.positions[at])

    def first_over(self, limit: float) -> tuple[str, int] | None:
        """The first layer with an error over the limit, and at how many positions."""
        for layer, line in zip(self.layers, self.values, strict=True):
            if over := sum(value > limit for value in line):
                return layer, over
        return None


def drift_map(report: Report, kinds: Mapping[str, str]) -> Html:
    """Error by layer and position, as a heat map."""
    drift = Drift.of(report)
    if drift is None:
        return NOTHING
    columns, values, width = _merged(drift, kinds)
    reading = (
        "A cell is the relative L2 error of the residual stream after one layer at one position: dark is little, bright is "
        "much, and the limit is marked on the colours. Data flow downwards: an error that begins in one row and stays below it "
        "was made in that layer, and one that keeps to the columns of one modality was made by its expert."
    )
    if width > 1:
        reading += f" A column is the worst of {width} neighbouring positions."
    limit = number(report.get("limit", nan))
    said = _what_drifts(drift, limit)
    axes = ("position in its sequence", "after layer", "relative L2 error of the residual stream (no unit, log scale)")
    words = Described("drift-map", "Error by layer and position", f"{said} {_by_layer(drift)}")
    chart = heat_map(words, [_short(layer) for layer in drift.layers], columns, values, limit, axes)
    return _figure(words.title, (reading, said), _map_signs(columns, values, kinds), chart, "wide")


def _what_drifts(drift: Drift, limit: float) -> str:
    value, layer, place = drift.worst()
    said = f"Largest: {shown(value)} after {layer}, {place}."
    first = drift.first_over(limit) if isfinite(limit) else None
    if first is not None:
        said += f" First over the limit of {shown(limit)}: {first[0]}, at {first[1]} of {len(drift.positions)} positions."
    elif isfinite(limit):
        said += f" Nothing is over the limit of {shown(limit)}."
    return said


def _by_layer(drift: Drift) -> str:
    """The worst of each layer, for those who do not see the cells."""
    worst = (f"{layer} {shown(max(line, default=nan))}" for layer, line in zip(drift.layers, drift.values, strict=True))
    return f"Worst after each layer: {', '.join(worst)}."


def _merged(drift: Drift, kinds: Mapping[str, str]) -> tuple[list[Column], list[list[float]], int]:
    """Columns that a page can hold: each the worst of as many neighbours as it takes."""
    most = min(MOST_COLUMNS, max(FEWEST_COLUMNS, MOST_CELLS // len(drift.layers)))
    width = ceil(len(drift.positions) / most)
    starts = range(0, len(drift.positions), width)
    columns = [_column(drift.positions[start : start + width], kinds) for start in starts]
    values = [[max(line[start : start + width], default=nan) for start in starts] for line in drift.values]
    return columns, values, width


def _column(positions: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Column:
    first = positions[0]
    modalities = {str(one.get("modality")) for one in positions}
    phases = {str(one.get("phase")) for one in positions}
    return Column(
        label=str(first.get("position", "")),
        kind=kinds[modalities.pop()] if len(modalities) == 1 else "mixed",
        shade=SHADES.get(phases.pop(), "mixed") if len(phases) == 1 else "mixed",
        group=str(first.get("row", "")),
        tip=_place(first) + (f" and {len(positions) - 1} more" if len(positions) > 1 else ""),
    )


def _map_signs(columns: Sequence[Column], values: Sequence[Sequence[float]], kinds: Mapping[str, str]) -> Html:
    """The bands above the columns, and the cells that have no colour of the scale."""
    there, shades = {one.kind for one in columns}, {one.shade for one in columns}
    cells = [value for line in values for value in line]
    upper = [(swatch(kind), name) for name, kind in kinds.items() if kind in there]
    lower = [(swatch(shade), phase) for phase, shade in SHADES.items() if shade in shades]
    odd = [(swatch("mixed"), "several kinds in one column")] * ("mixed" in there | shades)
    odd += [(swatch("exact"), "no error at all")] * any(value == 0 for value in cells)
    odd += [(swatch("broken"), "infinite or no number")] * any(not isfinite(value) for value in cells)
    return joined([legend(upper, "upper band:"), legend(lower, "lower band:"), legend(odd, "cells:")])


def drift_curves(report: Report, kinds: Mapping[str, str]) -> Html:
    """Median and worst error after each layer, by modality."""
    drift = Drift.of(report)
    if drift is None:
        return NOTHING
    limit = number(report.get("limit", nan))
    lines, signs, said = [], [], []
    for name, places in _places_of(drift).items():
        medians = [_median([line[at] for at in places if at < len(line)]) for line in drift.values]
        worst = [max((line[at] for at in places if at < len(line)), default=nan) for line in drift.values]
        kind = kinds[name]
        lines += [Line(f"{kind} most", worst), Line(f"{kind} middle", medians)]
        signs += [(swatch(f"{kind} middle", "line"), f"{name}, median"), (swatch(f"{kind} most", "line"), f"{name}, worst")]
        said.append(f"{name} ends at a median of {shown(medians[-1])} and a worst of {shown(worst[-1])}")
    if isfinite(limit):
        signs.append((swatch("limit", "line"), f"limit {shown(limit)}"))
    reading = (
        "How the error of the residual stream grows from layer to layer. Rounding alone climbs slowly and evenly; a step "
        "belongs to the layer at which it stands. Zero lies on the lower edge, and a value that is infinite leaves a gap."
    )
    words = Described("drift-curves", "Error after each layer, by modality", f"{'; '.join(said)}.")
    axes = ("after layer", "relative L2 error (log scale)")
    chart = line_chart(words, [_short(layer) for layer in drift.layers], lines, limit, axes)
    return _figure(words.title, (reading, f"{words.text[0].upper()}{words.text[1:]}"), legend(signs), chart)


def _places_of(drift: Drift) -> dict[str, list[int]]:
    """Which columns are of which modality."""
    found: dict[str, list[int]] = {}
    for at, one in enumerate(drift.positions):
        found.setdefault(str(one.get("modality")), []).append(at)
    return found


def _median(values: Sequence[float]) -> float:
    return median(values) if values else nan


@dataclass(frozen=True)
class Position:
    """One observed position: its error and the margin by which the reference preferred its choice, both in logits."""

    place: str
    scenario: str
    predicted: str
    relative_l2: float
    max_abs: float
    kl: float
    margin: float
    same_top_1: bool
    is_over: bool

    @classmethod
    def of(cls, told: Mapping[str, Any], limit: float) -> "Position":
        error = _or_infinity(number(told.get("relative_l2")))
        graph = str(told.get("graph") or "model")
        return cls(
            place=_place({**told, "modality": told.get("predicted")}),
            scenario=str(told.get("scenario", "")) + ("" if graph == "model" else f" ({graph})"),
            predicted=str(told.get("predicted")),
            relative_l2=error,
            max_abs=_or_infinity(number(told.get("max_abs"))),
            kl=_or_infinity(number(told.get("kl"))),
            margin=_or_infinity(number(told.get("margin"))),
            same_top_1=told.get("same_top_1") is not False,
            is_over=error > limit or not isfinite(error),
        )

    @property
    def stands_out(self) -> bool:
        return self.is_over or not self.same_top_1 or not isfinite(self.max_abs)


def margins(report: Report, kinds: Mapping[str, str]) -> Html:
    """The error of each position against the margin that it would have to overturn."""
    limit = number(report.get("limit", nan))
    positions = [Position.of(one, limit) for one in report.get("positions") or ()]
    if not positions:
        return NOTHING
    plain = [one for one in positions if not one.stands_out]
    dots = thinned(plain)
    outliers = sorted((one for one in positions if one.stands_out), key=lambda one: one.relative_l2)
    reading = (
        "A mark is one position: to the right, by how much the reference preferred its best id; upwards, the largest error of "
        "a logit there. In the shaded ground the error is more than half the margin and may overturn it; elsewhere it can not. "
        "Marks on the frame are zero or infinite."
    )
    if len(dots) < len(plain):
        reading += (
            f" Of {len(positions):,} positions {len(dots) + len(outliers):,} are drawn: every one that stands out, and some of "
            "those that pass where many lie close together."
        )
    said = _what_stands_out(positions)
    words = Described("margins", "Error against margin", said)
    marks = [_dot(one, kinds) for one in dots] + _outliers(outliers, kinds)
    axes = ("margin of the reference's best id (logits, log scale)", "largest error (logits, log scale)")
    chart = scatter(words, marks, OVERTURNED, axes)
    return _figure(words.title, (reading, said), _mark_signs(positions, kinds), chart, more=_worst_positions(positions))


def thinned(positions: Sequence[Position]) -> list[Position]:
    """All of them where they are few; else the first of those that would lie on one another, evenly thinned if need be.

    Nothing is drawn by lot: the same report makes the same page.
    """
    if len(positions) <= MOST_DOTS:
        return list(positions)
    apart: dict[tuple[str, int, int], Position] = {}
    for one in positions:
        apart.setdefault((one.predicted, _cell_of(one.margin), _cell_of(one.max_abs)), one)
    return list(apart.values())[:: ceil(len(apart) / MOST_DOTS)]


def _cell_of(value: float) -> int:
    return round(log10(value) * CELLS_PER_DECADE) if value > 0 and isfinite(value) else -(10**6)


def _dot(one: Position, kinds: Mapping[str, str]) -> Mark:
    return Mark(kinds[one.predicted], one.margin, one.max_abs)


def _outliers(positions: Sequence[Position], kinds: Mapping[str, str]) -> list[Mark]:
    """Every one of them; the worst, which come last, have a word to them."""
    silent = len(positions) - MOST_TIPS
    return [_outlier(one, kinds, is_told=number >= silent) for number, one in enumerate(positions)]


def _outlier(one: Position, kinds: Mapping[str, str], is_told: bool) -> Mark:
    shape = "arrow" if not isfinite(one.max_abs) else "dot" if one.same_top_1 else "diamond"
    look = "over" if one.is_over else "flip"
    tip = f"{one.scenario}, {one.place}: error {shown(one.max_abs)}, margin {shown(one.margin)}" if is_told else ""
    return Mark(f"{kinds[one.predicted]} {look}", one.margin, one.max_abs, shape, tip)


def _what_stands_out(positions: Sequence[Position]) -> str:
    flips = [one for one in positions if not one.same_top_1]
    over = sum(one.is_over for one in positions)
    said = f"{counted(len(positions), 'position')}: "
    said += f"{over:,} over the limit, " if over else "none over the limit, "
    if not flips:
        return f"{said}and the best id is the reference's everywhere."
    known = [one.margin for one in flips if isfinite(one.margin)]
    margin = f", in spite of margins of up to {shown(max(known))}" if known else ""
    return f"{said}and at {len(flips):,} another best id{margin}."


def _mark_signs(positions: Sequence[Position], kinds: Mapping[str, str]) -> Html:
    there = {one.predicted for one in positions}
    signs = [(swatch(kind, "dot"), f"predicts {name}") for name, kind in kinds.items() if name in there]
    signs += [(swatch("flip", "diamond"), "another best id")] * any(not one.same_top_1 for one in positions)
    signs += [(swatch("over", "dot"), "red rim: over the limit")] * any(one.is_over for one in positions)
    signs += [(swatch("over", "arrow"), "infinite or no number")] * any(not isfinite(one.max_abs) for one in positions)
    signs.append((swatch("boundary", "line"), "error = margin / 2"))
    return legend(signs)


def _worst_positions(positions: Sequence[Position]) -> Html:
    worst = sorted(positions, key=lambda one: -one.relative_l2)[:NUM_WORST]
    name = f"The {len(worst)} worst positions"
    columns = ("scenario", "where", "relative L2>", "max abs>", "KL (nats)>", "margin>", "same best id")
    rows = [
        row(columns, (one.scenario, one.place, *map(shown, (one.relative_l2, one.max_abs, one.kl, one.margin, one.same_top_1))))
        for one in worst
    ]
    return folded(name, table(name, columns, rows))


def greedy(report: Report, kinds: Mapping[str, str]) -> Html:
    """Where two greedy generations part, a strip for each plan."""
    plans = report.get("greedy") or ()
    if not plans:
        return NOTHING
    strips = [_plan(number, plan, kinds) for number, plan in enumerate(plans)]
    reading = (
        "A strip is one generation, token after token; a full cell is a token that both chose, in the colour of its modality. "
        "The crossed cell is the first that differs; after it the two read different texts, and are no longer compared."
    )
    named = {str(name) for plan in plans for name in plan.get("modalities") or ()}
    signs = [(swatch(kind), name) for name, kind in kinds.items() if name in named]
    if any(_first_difference(plan) is not None for plan in plans):
        signs += [(swatch("broken"), "first difference"), (swatch("unasked"), "not compared")]
    return _figure("Greedy generation, token by token", (reading,), legend(signs), tag("div", *strips, class_="strips"), "wide")


def _plan(index: int, plan: Mapping[str, Any], kinds: Mapping[str, str]) -> Html:
    modalities = [str(name) for name in plan.get("modalities") or ()]
    expected, came = plan.get("expected") or (), plan.get("came") or ()
    count, parted = max(len(expected), len(came)), _first_difference(plan)
    name, said = str(plan.get("plan", "")), _what_was_said(plan)
    looks = [_token_kind(at, parted, modalities, kinds) for at in range(count)]
    tips = [f"token {at}{_at(modalities, at, ', ')}: {_at(expected, at)} expected, {_at(came, at)} came" for at in range(count)]
    words = Described(f"greedy-{index}", f"Greedy tokens {name}", said)
    told = tag("p", tag("b", name), ": ", tag("span", said, class_="fail" if parted is not None else None))
    return tag("div", told, strip(words, looks, tips, "token (number in the generation)"), class_="plan")


def _first_difference(plan: Mapping[str, Any]) -> int | None:
    """Where the first token differs or is missing; None where all agree."""
    expected, came = list(plan.get("expected") or ()), list(plan.get("came") or ())
    if expected == came:
        return None
    pairs = enumerate(zip(expected, came, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(expected), len(came)))


def _what_was_said(plan: Mapping[str, Any]) -> str:
    expected, came, at = plan.get("expected") or (), plan.get("came") or (), _first_difference(plan)
    if at is None:
        return f"all {counted(len(expected), 'token')} agree."
    if at >= min(len(expected), len(came)):
        return f"the first {counted(at, 'token')} agree, then {len(came)} came where {len(expected)} were expected."
    modality, margin = _at(plan.get("modalities") or (), at, ", "), _at(plan.get("margins") or (), at)
    preferred = f", by a margin of {shown(number(margin))}" if margin != "nothing" else ""
    return f"token {at}{modality} is the first that differs: {expected[at]} expected{preferred}; {came[at]} came."


def _token_kind(at: int, parted: int | None, modalities: Sequence[str], kinds: Mapping[str, str]) -> str:
    if parted is None or at < parted:
        return kinds[modalities[at]] if at < len(modalities) else "mixed"
    return "broken" if at == parted else "unasked"


def _at(values: Sequence[Any], at: int, before: str | None = None) -> str:
    """The value at a place, behind ``before`` where that is given; a missing one is nothing, by word or by silence."""
    if at < len(values):
        return f"{before or ''}{values[at]}"
    return "nothing" if before is None else ""


def _figure(title: str, sentences: Sequence[str], signs: Html, chart: Html, kind: str = "beside", more: Html = NOTHING) -> Html:
    said = tag("figcaption", tag("h3", title), *(tag("p", one) for one in sentences), signs)
    return tag("figure", said, tag("div", chart, more, class_="canvas"), class_=kind)


def _place(told: Mapping[str, Any]) -> str:
    return f"row {told.get('row')}, position {told.get('position')} ({told.get('modality')}, {told.get('phase')})"


def _short(layer: str) -> str:
    """The axis says 'after layer' already."""
    return layer.removeprefix("layer ")


def _or_infinity(value: float) -> float:
    """NaN is worse than every number, and must not pass a comparison by."""
    return inf if isnan(value) else value

"""Charts as inline SVG: plain strings, no script, colours by the page's classes so that they follow its light and dark.

Each chart is an image with a title and a description for those who do not see it. Coordinates are those of a view box; what
is drawn scales with the page, and the room around it holds the larger letters that a phone gets. It knows how to draw, and
nothing of what the numbers mean.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10

from motrt.export.html_parts import Html, shown, tag

WIDTH, HEIGHT = 560.0, 354.0
LEFT, RIGHT, TOP, BOTTOM = 92.0, 12.0, 12.0, 66.0
WIDE, WIDE_LEFT = 640.0, 104.0

LETTER_HEIGHT = 20.0  # of the largest letters, a phone's, in units of the view box
LETTER_WIDTH = 10.0
LETTER_GAP = 6.0

STEPS = tuple(factor * 10**power for power in range(5) for factor in (1, 2, 4, 5))  # from one label to the next

# Decades beyond these are no errors of anything, and powers of ten beyond 308 no floats.
LEAST_EXPONENT, MOST_EXPONENT = -300, 300

# Viridis (Smith and van der Walt, 2015): even steps to the eye, also for those who see fewer colours, and in grey print.
VIRIDIS = (
    (68, 1, 84),
    (72, 36, 117),
    (65, 68, 135),
    (53, 95, 141),
    (42, 120, 142),
    (33, 145, 140),
    (34, 168, 132),
    (68, 191, 112),
    (122, 209, 81),
    (189, 223, 38),
    (253, 231, 37),
)


@dataclass(frozen=True)
class Described:
    """What is said of a chart to those who do not see it.

    Attributes:
        name: of the chart on its page, a word without spaces.
        title: what it shows.
        text: what there is to be seen.
    """

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class LogScale:
    """Positive numbers laid on a line by their logarithm; what is beyond either end lies on it.

    Attributes:
        low: the number at ``start``.
        high: the number at ``end``.
        start: a coordinate.
        end: a coordinate.
    """

    low: float
    high: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        assert 0 < self.low < self.high and isfinite(self.high)

    @classmethod
    def over(cls, values: Iterable[float], start: float = 0.0, end: float = 1.0, is_whole: bool = True) -> "LogScale":
        """A scale that holds every finite positive value; ``is_whole`` ends it at powers of ten."""
        logs = [log10(value) for value in values if isfinite(value) and value > 0] or [0.0]
        low, high = (min(max(one, LEAST_EXPONENT), MOST_EXPONENT) for one in (min(logs), max(logs)))
        if is_whole:
            low, high = floor(low), ceil(high)
        if high - low < 1e-3:
            low, high = low - 0.5, high + 0.5
            low, high = (floor(low), ceil(high)) if is_whole else (low, high)
        return cls(10.0**low, 10.0**high, start, end)

    def share(self, value: float) -> float:
        """How far along ``value`` lies, from 0 to 1; infinity and NaN at the far end."""
        if not value > 0:
            return 0.0 if value <= 0 else 1.0
        if not isfinite(value):
            return 1.0
        low, high = log10(self.low), log10(self.high)
        return min(1.0, max(0.0, (log10(value) - low) / (high - low)))

    def at(self, value: float) -> float:
        return self.start + self.share(value) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low * 0.999 <= value <= self.high * 1.001  # an end has been through a logarithm

    def ticks(self, most: int = 7) -> list[float]:
        """Powers of ten, thinned to ``most``; where there are hardly any, their doubles and fives too."""
        first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
        whole = range(first, last + 1)
        if len(whole) >= 3:
            step = ceil(len(whole) / most)
            return [10.0**one for one in whole[::step]]
        fine = [factor * 10.0**one for one in range(first - 1, last + 1) for factor in (1.0, 2.0, 5.0)]
        return [one for one in fine if self.low * 0.999 <= one <= self.high * 1.001] or [self.low, self.high]


@dataclass(frozen=True)
class Line:
    """One line of a chart: ``kind`` is its class on the page."""

    kind: str
    values: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """One mark of a scatter.

    Attributes:
        kind: its class on the page.
        x: a positive number, or what is beyond the scale.
        y: likewise.
        shape: ``dot``, ``diamond`` or ``arrow``.
        tip: what is said of it when it is pointed at; nothing where empty.
    """

    kind: str
    x: float
    y: float
    shape: str = "dot"
    tip: str = ""


@dataclass(frozen=True)
class Column:
    """One column of a heat map.

    Attributes:
        label: stands below it where there is room.
        kind: the class of the band above it.
        shade: the class of the second band.
        group: neighbours of another group stand a little apart.
        tip: what is said of it when it is pointed at.
    """

    label: str
    kind: str
    shade: str
    group: str
    tip: str


def viridis(share: float) -> str:
    """The colour at ``share`` of the way, as a page writes it."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    mixed = [round(a + (b - a) * (place - below)) for a, b in zip(VIRIDIS[below], VIRIDIS[below + 1], strict=True)]
    return "#" + "".join(f"{one:02x}" for one in mixed)


def swatch(kind: str, shape: str = "box", colour: str | None = None) -> Html:
    """A sign for a legend: a ``box``, a ``line``, or a mark of a scatter."""
    signs = {
        "box": tag("rect", x=1.0, y=1.0, width=12.0, height=12.0, class_=kind, fill=colour),
        "line": tag("line", x1=0.0, x2=14.0, y1=7.0, y2=7.0, class_=kind),
    }
    sign = signs[shape] if shape in signs else _shape(shape, 7.0, 7.0, kind)
    return tag("svg", sign, class_="swatch", viewBox="0 0 14 14", aria_hidden="true")


def bar(ratio: float, kind: str) -> Html:
    """How much of what is allowed is taken; the upright line is all of it. The number stands beside it on the page."""
    at_limit, end = 80.0, 100.0
    length = end if not isfinite(ratio) else min(end, max(0.8, ratio * at_limit))
    drawn = (
        tag("rect", x=0.0, y=2.0, width=end, height=8.0, class_="track"),
        tag("rect", x=0.0, y=2.0, width=length, height=8.0, class_=f"tone {kind}"),
        tag("line", x1=at_limit, x2=at_limit, y1=0.0, y2=12.0, class_="edge"),
    )
    return tag("svg", *drawn, class_="bar", viewBox="0 0 100 12", preserveAspectRatio="none", aria_hidden="true")


def line_chart(words: Described, labels: Sequence[str], lines: Sequence[Line], limit: float, axes: tuple[str, str]) -> Html:
    """Lines over named places, the values by their logarithm; ``limit`` is a dashed line, left out where it is no number.

    A value that is infinite or no number leaves a gap, and zero lies on the lower edge.
    """
    values = [value for line in lines for value in line.values]
    y_scale = LogScale.over([*values, limit], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(labels) - 1)
    places = [LEFT + step * index for index in range(len(labels))]
    sizes = _widths(labels)
    kept = with_room(labels, [min(x, WIDTH - size / 2) for x, size in zip(places, sizes, strict=True)], sizes)
    frame = _frame([(places[index], labels[index]) for index in kept], _tick_marks(y_scale), axes)
    drawn = [part for line in lines for part in _line(line, places, y_scale)]
    if y_scale.holds(limit):
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y_scale.at(limit), y2=y_scale.at(limit), class_="limit"))
    return _chart(words, WIDTH, HEIGHT, [*frame, *drawn])


def scatter(words: Described, marks: Sequence[Mark], slope: float, axes: tuple[str, str]) -> Html:
    """Marks on two logarithmic scales, the ground above the boundary y = ``slope`` * x shaded.

    Marks of one kind and shape are one group, in the order in which kinds first appear: the last lie on top.
    """
    least = min((mark.x for mark in marks if isfinite(mark.x) and mark.x > 0), default=1.0)
    x_scale = LogScale.over([mark.x for mark in marks], LEFT, WIDTH - RIGHT)
    # The boundary is always in sight: it begins at the least x.
    y_scale = LogScale.over([*(mark.y for mark in marks), slope * least], HEIGHT - BOTTOM, TOP)
    frame = _frame(_tick_marks(x_scale), _tick_marks(y_scale), axes)
    groups: dict[tuple[str, str], list[Html]] = {}
    for mark in marks:
        drawn = _shape(mark.shape, x_scale.at(mark.x), y_scale.at(mark.y), None, mark.tip)
        groups.setdefault((mark.shape, mark.kind), []).append(drawn)
    drawn_groups = [tag("g", *group, class_=kind) for (_, kind), group in groups.items()]
    return _chart(words, WIDTH, HEIGHT, [*_boundary(x_scale, y_scale, slope), *frame, *drawn_groups])


def heat_map(
    words: Described,
    labels: Sequence[str],
    columns: Sequence[Column],
    values: Sequence[Sequence[float]],
    limit: float,
    axes: tuple[str, str, str],
) -> Html:
    """A cell for each label and column, coloured by the logarithm of its value; bands above say what the columns are.

    Args:
        words: for those who do not see it.
        labels: of the rows, from the top down.
        columns: from the left to the right.
        values: a row of values for each label.
        limit: is marked at the colours; NaN where there is none.
        axes: what is below the columns, beside the rows, and what the colours mean.
    """
    top, height = 26.0, min(16.0, max(5.0, 300.0 / len(labels)))
    bottom = top + height * len(labels)
    # With the limit among the colours, the bright ones mean the same on every page.
    scale = LogScale.over([limit, *(value for line in values for value in line)], is_whole=False)
    places, width = _column_places(columns)
    drawn = [_band(columns, places, width)]
    for index, (label, line) in enumerate(zip(labels, values, strict=False)):
        drawn.append(_cells(label, columns, line, places, (top + height * index, width, height), scale))
    middles = [top + height * (index + 0.5) for index in range(len(labels))]
    shown_rows = with_room(labels, middles, [LETTER_HEIGHT] * len(labels))
    drawn += [_letters(labels[index], WIDE_LEFT - 6, middles[index] + 3.5, "end") for index in shown_rows]
    drawn += _column_labels(columns, places, width, bottom)
    drawn.append(_letters(axes[0], (WIDE_LEFT + WIDE - RIGHT) / 2, bottom + 46, "middle", "name"))
    drawn.append(_upright(axes[1], (top + bottom) / 2))
    drawn += _colour_bar(scale, bottom + 80, limit, axes[2])
    return _chart(words, WIDE, bottom + 142, drawn, "wide")


def strip(words: Described, kinds: Sequence[str], tips: Sequence[str], axis: str) -> Html:
    """A row of cells; a cell of kind ``broken`` is larger and crossed."""
    left, width = 10.0, (WIDE - 20.0) / max(1, len(kinds))
    drawn = []
    for index, (kind, tip) in enumerate(zip(kinds, tips, strict=True)):
        is_broken = kind == "broken"
        top, height = (2.0, 30.0) if is_broken else (6.0, 22.0)
        box = _cell(left + width * index, top, max(1.0, width - min(1.5, width / 8)), height, tip, class_=kind)
        drawn.append(box)
        if is_broken:
            drawn.append(_cross(left + width * (index + 0.5), 17.0, min(6.0, width / 3)))
    every = max(1, ceil(44.0 / width / 4)) * 4
    marks = range(0, len(kinds), every)
    drawn += [_letters(str(index), left + width * (index + 0.5), 50.0, "middle") for index in marks]
    drawn.append(_letters(axis, WIDE / 2, 71.0, "middle", "name"))
    return _chart(words, WIDE, 76.0, drawn, "wide")


def with_room(labels: Sequence[str], places: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Which labels can stand at their places without touching.

    Words at either end come before all others. Of numbers it is the multiples of the smallest step that leaves room; of other
    labels, every so many.
    """
    last = len(labels) - 1
    ends = [index for index in (0, last) if labels and _count(labels[index]) is None]
    for step in STEPS:
        inner = [index for index in range(last + 1) if index not in ends and _is_multiple(labels[index], index, step)]
        kept = sorted({*ends, *(index for index in inner if all(_are_apart(index, end, places, sizes) for end in ends))})
        if all(_are_apart(one, other, places, sizes) for one, other in pairwise(kept)):
            return kept
    return ends[:1]


def _is_multiple(label: str, index: int, step: int) -> bool:
    count = _count(label)
    return (index if count is None else count) % step == 0


def _count(label: str) -> int | None:
    return int(label) if label.isdecimal() and len(label) <= 9 else None


def _are_apart(one: int, other: int, places: Sequence[float], sizes: Sequence[float]) -> bool:
    return abs(places[one] - places[other]) >= (sizes[one] + sizes[other]) / 2 + LETTER_GAP


def _chart(words: Described, width: float, height: float, drawn: Iterable[Html], kind: str = "") -> Html:
    title, text = f"{words.name}-title", f"{words.name}-text"
    said = (tag("title", words.title, id=title), tag("desc", words.text, id=text))
    box = f"0 0 {width:g} {height:.0f}"
    names = {"role": "img", "aria_labelledby": title, "aria_describedby": text}
    return tag("svg", *said, *drawn, class_=f"chart {kind}".strip(), viewBox=box, **names)


def _widths(labels: Sequence[str]) -> list[float]:
    return [len(label) * LETTER_WIDTH for label in labels]


def _letters(text: str, x: float, y: float, anchor: str = "start", kind: str | None = None) -> Html:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=kind)


def _upright(text: str, middle: float) -> Html:
    """The name of an upright axis, at the left edge, read from below."""
    return tag("text", text, text_anchor="middle", class_="name", transform=f"translate(16 {middle:.1f}) rotate(-90)")


def _tick_marks(scale: LogScale) -> list[tuple[float, str]]:
    return [(scale.at(value), shown(value)) for value in scale.ticks()]


def _frame(below: Sequence[tuple[float, str]], beside: Sequence[tuple[float, str]], axes: tuple[str, str]) -> list[Html]:
    """Rules, what stands at them, and the names of both axes."""
    ground, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    upright = [tag("line", x1=x, x2=x, y1=TOP, y2=ground) for x, _ in below]
    level = [tag("line", x1=LEFT, x2=right, y1=y, y2=y) for y, _ in beside]
    return [
        tag("g", *upright, *level, class_="rules"),
        tag("rect", x=LEFT, y=TOP, width=right - LEFT, height=ground - TOP, class_="frame"),
        *(_below(text, x, ground + 23, WIDTH) for x, text in below),
        *(_letters(text, LEFT - 7, y + 4, "end") for y, text in beside),
        _letters(axes[0], (LEFT + right) / 2, HEIGHT - 10, "middle", "name"),
        _upright(axes[1], (TOP + ground) / 2),
    ]


def _below(text: str, x: float, y: float, width: float) -> Html:
    """Letters under ``x``, moved inwards where they would leave the chart."""
    if x + len(text) * LETTER_WIDTH / 2 > width:
        return _letters(text, width - 1, y, "end")
    return _letters(text, x, y, "middle")


def _line(line: Line, places: Sequence[float], scale: LogScale) -> list[Html]:
    """Its unbroken pieces; a piece of one value is a dot."""
    pieces: list[list[str]] = [[]]
    for x, value in zip(places, line.values, strict=False):
        if isfinite(value):
            pieces[-1].append(f"{x:.1f},{scale.at(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    drawn = [tag("polyline", points=" ".join(piece), class_=line.kind) for piece in pieces if len(piece) > 1]
    alone = [piece[0].split(",") for piece in pieces if len(piece) == 1]
    return drawn + [tag("circle", cx=x, cy=y, r=3.0, class_=line.kind) for x, y in alone]


def _shape(shape: str, x: float, y: float, kind: str | None, tip: str = "") -> Html:
    said = (tag("title", tip),) if tip else ()
    if shape == "dot":
        return tag("circle", *said, cx=x, cy=y, r=2.6, class_=kind)
    corners = {"diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)), "arrow": ((0, -5), (5.5, 5), (-5.5, 5))}[shape]
    path = "L".join(f"{x + across:.1f} {y + down:.1f}" for across, down in corners)
    return tag("path", *said, d=f"M{path}Z", class_=kind)


def _boundary(x_scale: LogScale, y_scale: LogScale, slope: float) -> list[Html]:
    """The line y = slope * x within the frame, and the ground above it."""
    first, last = max(x_scale.low, y_scale.low / slope), min(x_scale.high, y_scale.high / slope)
    if first >= last:
        return []
    (x1, y1), (x2, y2) = ((x_scale.at(x), y_scale.at(slope * x)) for x in (first, last))
    corners = [(x1, y1), (x2, y2), (x2, y_scale.end), (x_scale.start, y_scale.end), (x_scale.start, y1)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
    return [tag("path", d=f"M{path}Z", class_="ground"), tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="boundary")]


def _column_places(columns: Sequence[Column]) -> tuple[list[float], float]:
    """Where each column begins, and how wide it is; groups stand a little apart."""
    gap = 4.0
    breaks = [one.group != before.group for before, one in pairwise(columns)]
    width = (WIDE - WIDE_LEFT - RIGHT - gap * sum(breaks)) / len(columns)
    gaps = [gap * sum(breaks[:index]) for index in range(len(columns))]
    return [WIDE_LEFT + width * index + gaps[index] for index in range(len(columns))], width


def _band(columns: Sequence[Column], places: Sequence[float], width: float) -> Html:
    """What the columns are: a band of kinds, and a thinner one of shades."""
    kinds = [
        tag("rect", x=x, y=2.0, width=width + 0.3, height=11.0, class_=one.kind) for one, x in zip(columns, places, strict=True)
    ]
    shades = [
        tag("rect", x=x, y=15.0, width=width + 0.3, height=7.0, class_=one.shade)
        for one, x in zip(columns, places, strict=True)
    ]
    return tag("g", *kinds, *shades)


def _cells(
    label: str,
    columns: Sequence[Column],
    values: Sequence[float],
    places: Sequence[float],
    place: tuple[float, float, float],
    scale: LogScale,
) -> Html:
    top, width, height = place
    drawn = []
    for column, value, x in zip(columns, values, places, strict=False):
        tip = f"{label}, {column.tip}: {shown(value)}"
        # A hair wider than its place: else the paper would show between neighbours.
        box = (
            {"fill": viridis(scale.share(value))}
            if value > 0 and isfinite(value)
            else {"class_": "exact" if value <= 0 else "broken"}
        )
        drawn.append(_cell(x, top, width + 0.3, height + 0.3, tip, **box))
    return tag("g", *drawn)


def _cell(x: float, y: float, width: float, height: float, tip: str, **look: str) -> Html:
    return tag("rect", tag("title", tip), x=x, y=y, width=width, height=height, **look)


def _cross(x: float, y: float, arm: float) -> Html:
    corners = (x - arm, y - arm, x + arm, y + arm, x + arm, y - arm, x - arm, y + arm)
    return tag("path", d="M{:.1f} {:.1f}L{:.1f} {:.1f}M{:.1f} {:.1f}L{:.1f} {:.1f}".format(*corners), class_="cross")


def _column_labels(columns: Sequence[Column], places: Sequence[float], width: float, bottom: float) -> list[Html]:
    middles = [x + width / 2 for x in places]
    labels = [one.label for one in columns]
    kept = with_room(labels, middles, _widths(labels))
    ticks = [tag("line", x1=middles[i], x2=middles[i], y1=bottom + 1, y2=bottom + 5, class_="tick") for i in kept]
    return ticks + [_below(columns[i].label, middles[i], bottom + 21, WIDE) for i in kept]


def _colour_bar(scale: LogScale, top: float, limit: float, name: str) -> list[Html]:
    """What the colours mean. Of small boxes: a gradient would be a reference, and a page has none."""
    count, left, length = 60, WIDE_LEFT, WIDE - WIDE_LEFT - RIGHT
    width = length / count
    boxes = [
        tag("rect", x=left + width * i, y=top, width=width + 0.3, height=10.0, fill=viridis((i + 0.5) / count))
        for i in range(count)
    ]
    laid = LogScale(scale.low, scale.high, left, left + length)
    marks = [(laid.at(value), shown(value)) for value in laid.ticks()]
    texts = [text for _, text in marks]
    kept = with_room(texts, [x for x, _ in marks], _widths(texts))
    ticks = [tag("line", x1=marks[i][0], x2=marks[i][0], y1=top + 10, y2=top + 14, class_="tick") for i in kept]
    letters = [_below(marks[i][1], marks[i][0], top + 30, WIDE) for i in kept]
    if scale.holds(limit):
        x = laid.at(limit)
        ticks.append(tag("line", x1=x, x2=x, y1=top - 4, y2=top + 10, class_="limit"))
        letters.append(_letters("limit", x, top - 8, "middle", "name"))
    return [tag("g", *boxes), *ticks, *letters, _letters(name, left + length / 2, top + 54, "middle", "name")]

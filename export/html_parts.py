"""Pieces of a page: markup that no string can break, tables that stay in their place, numbers as people read them.

A string becomes part of a page only through ``tag``, which escapes whatever is not ``Html`` already. That is the whole
defence, so nothing else in this package puts angle brackets around anything. It knows nothing of reports and charts.
"""

from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite, isnan, nan

from motrt.export.report import printable

WITHOUT_END = frozenset({"meta", "br"})
DRAWN = frozenset({"circle", "line", "path", "polyline", "rect"})  # of SVG: they end themselves where they hold nothing


class Html(str):
    """Text that is markup already; every other string is escaped where it becomes part of a page."""

    __slots__ = ()


NOTHING = Html("")


def joined(parts: Iterable[Html]) -> Html:
    """Markup after markup, a line each."""
    return Html("\n".join(part for part in parts if part))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the element.
        children: ``Html`` stays as it is, everything else is written as text.
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``; None and False leave one out, True writes
            its name alone.
    """
    start = "".join((name, *(_attribute(key, value) for key, value in attributes.items())))
    if name in WITHOUT_END:
        return Html(f"<{start}>")
    if name in DRAWN and not children:
        return Html(f"<{start}/>")
    return Html(f"<{start}>{''.join(_child(one) for one in children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{_text(_coordinate(value) if isinstance(value, float) else value)}"'


def _child(child: object) -> str:
    return child if isinstance(child, Html) else _text(child)


def _text(value: object) -> str:
    return escape(printable(str(value)))


def _coordinate(value: float) -> str:
    """A tenth of a unit is less than a pixel: more digits would only make the page longer."""
    return f"{value:.1f}".removesuffix(".0")


def number(value: object) -> float:
    """A figure of a report; JSON has no word for infinity and NaN, so they come as strings. NaN where it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return nan


def shown(value: object) -> str:
    """A figure as people read it: two digits tell, whole numbers are whole, words stay words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    figure = number(value)
    if isnan(figure):
        return "NaN" if isinstance(value, float) or str(value) == "nan" else str(value)
    if not isfinite(figure):
        return "∞" if figure > 0 else "-∞"
    if isinstance(value, str):
        return value
    if figure == 0 or 0.01 <= abs(figure) < 1000:
        return f"{figure:.3g}"
    mantissa, _, exponent = f"{figure:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def percent(share: float) -> str:
    """A share that is not whole is never written as 100 %."""
    if not isfinite(share):
        return shown(share)
    if 0.999 <= share < 1:
        return "99.9 %"
    return f"{share * 100:.3g} %"


def table(name: str, columns: Sequence[str], rows: Sequence[Html]) -> Html:
    """A table that scrolls inside its own box; columns whose name ends in ``>`` are numbers, right-aligned."""
    heads = [tag("th", one.removesuffix(">"), scope="col", class_="number" if one.endswith(">") else None) for one in columns]
    content = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *rows))
    # A box that scrolls must be reachable without a mouse, and then have a name.
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=name)


def row(columns: Sequence[str], cells: Sequence[object], kind: str | None = None) -> Html:
    """One row under ``columns``; its first cell names it."""
    made = [
        tag("td" if place else "th", cell, class_=_cell_kind(column, cell), scope=None if place else "row")
        for place, (column, cell) in enumerate(zip(columns, cells, strict=True))
    ]
    return tag("tr", *made, class_=kind)


def _cell_kind(column: str, cell: object) -> str | None:
    return "number" if column.endswith(">") and not isinstance(cell, Html) else None


def folded(summary: object, *children: object, is_open: bool = False) -> Html:
    """What is there for those who ask."""
    return tag("details", tag("summary", summary), *children, open=is_open)


def legend(entries: Iterable[tuple[Html, str]], name: str = "") -> Html:
    """Signs and what they mean, in HTML: its lines wrap on a narrow screen, an SVG's would not."""
    meanings = [tag("li", sign, " ", meaning) for sign, meaning in entries]
    heads = [tag("li", name, class_="of")] if name else []
    return tag("ul", *heads, *meanings, class_="legend") if meanings else NOTHING


def counted(count: int, one: str, many: str = "") -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"

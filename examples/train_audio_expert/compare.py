"""Runs of train.py laid side by side: one JSON document, one table, one chart.

    python examples/train_audio_expert/compare.py RUN.jsonl ... --json FILE --chart FILE.svg

All runs must have looked at what was held out after the same steps: give each the same --steps.
"""

import json
from dataclasses import dataclass
from math import log, nan
from pathlib import Path
from typing import Any

import click

from motrt.errors import InputError, MotrtError
from motrt.export.html_parts import Html, tag
from motrt.export.page_style import STYLE
from motrt.export.svg_charts import HEIGHT, WIDTH, Described, Line, line_chart, swatch

# Lines that lie on each other are told apart by being solid and dotted.
KINDS = ("m4 middle", "m2 middle", "m1 middle", "m0 most", "m3 middle", "m5 most")
LEGEND = 22.0  # height of a line of the legend


@dataclass(frozen=True)
class Run:
    """One run as its metrics tell it.

    Attributes:
        name: policy, and how the embedding's new rows began where they were not made from the sound.
        steps: after which the held-out losses were taken.
        audio: those of codes.
        text: those of text.
        result: the last line of the metrics.
    """

    name: str
    steps: tuple[int, ...]
    audio: tuple[float, ...]
    text: tuple[float, ...]
    result: dict[str, Any]


def read_run(file: Path) -> Run:
    """Read one file of metrics.

    Raises:
        InputError: when it is none, or the run did not come to its end.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        options, result = lines[0]["options"], lines[-1]["result"]
        looks = [line for line in lines if "held_out" in line]
        values = {kind: tuple(line["held_out"][kind] for line in looks) for kind in ("audio", "text")}
    except (OSError, ValueError, LookupError, TypeError) as failure:
        raise InputError(f"{file} is not the metrics of a run that came to its end ({failure!r})") from None
    began = "" if options["embedding"] == "sound" else f", embedding {options['embedding']}"
    return Run(f"{options['policy']}{began}", tuple(line["step"] for line in looks), **values, result=result)


def document(runs: list[Run]) -> dict[str, Any]:
    """Everything that the runs tell, as plain JSON values."""
    return {run.name: {"steps": run.steps, "audio": run.audio, "text": run.text, "result": run.result} for run in runs}


def chart(runs: list[Run]) -> Html:
    """Audio above, text below, a line for each run; the dashed line is a loss that knows nothing.

    Raises:
        InputError: when the runs looked after different steps.
    """
    if len({run.steps for run in runs}) != 1:
        raise InputError("these runs looked at the held-out clips after different steps: give each the same --steps")
    labels = [str(step) for step in runs[0].steps]
    audio = [Line(kind, run.audio) for kind, run in zip(KINDS, runs, strict=False)]
    text = [Line(kind, run.text) for kind, run in zip(KINDS, runs, strict=False)]
    chance = log(runs[0].result["audio_ids"])
    panels = (
        line_chart(
            Described("audio", "Audio loss over steps", f"All but the frozen head fall from {chance:.2f}."),
            labels, audio, chance, ("steps", "audio loss (nats)"),
        ),
        line_chart(
            Described("text", "Text loss over steps", "Level, but where the text head is trained."),
            labels, text, nan, ("steps", "text loss (nats)"),
        ),
    )  # fmt: skip
    room = LEGEND * (len(runs) + 1)
    drawn = [_placed(panel, 0.0, room + index * (HEIGHT + 10), WIDTH, HEIGHT) for index, panel in enumerate(panels)]
    signs = [_sign(kind, run.name, index) for index, (kind, run) in enumerate(zip(KINDS, runs, strict=False))]
    signs.append(_sign("limit", "every code equally likely", len(runs)))
    height = room + 2 * (HEIGHT + 10)
    box, letters = f"0 0 {WIDTH:g} {height:g}", "font-family: system-ui, sans-serif"
    drawn = [tag("style", Html(STYLE)), *signs, *drawn]
    return tag("svg", *drawn, xmlns="http://www.w3.org/2000/svg", viewBox=box, style=letters)


def _placed(inner: Html, x: float, y: float, width: float, height: float) -> Html:
    return tag("svg", inner, x=x, y=y, width=width, height=height)


def _sign(kind: str, name: str, line: int) -> Html:
    words = tag("text", name, x=34.0, y=LEGEND * line + 16, style="font-size: 14px; fill: var(--ink)")
    return Html(_placed(swatch(kind, "line"), 10.0, LEGEND * line + 4, 16.0, 16.0) + words)


def table(runs: list[Run]) -> str:
    """A line for each run, as Markdown."""
    rows = ["| policy | weights trained | audio loss | text loss | text logits | `motrt export` |", "|---|---|---|---|---|---|"]
    for run in runs:
        same = "the same bits" if run.result["text_unchanged"] else "changed"
        verdict = "refuses it" if run.result["untrained"] else "takes it"
        ends = [f"{values[0]:.3f} → {values[-1]:.3f}" for values in (run.audio, run.text)]
        rows.append(f"| {run.name} | {run.result['trained']:,} | {ends[0]} | {ends[1]} | {same} | {verdict} |")
    return "\n".join(rows)


@click.command()
@click.argument("metrics", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path))
@click.option("--chart", "chart_file", type=click.Path(path_type=Path))
def main(metrics: tuple[Path, ...], json_file: Path | None, chart_file: Path | None) -> None:
    """Lay the runs whose METRICS are given side by side."""
    try:
        runs = [read_run(file) for file in metrics]
        if json_file is not None:
            json_file.write_text(json.dumps(document(runs), indent=1) + "\n", encoding="utf-8")
        if chart_file is not None:
            chart_file.write_text(chart(runs) + "\n", encoding="utf-8")
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    click.echo(table(runs))


if __name__ == "__main__":
    main()

"""How cost grows on a CPU: with context, batch, share of audio rows, and size of the model; beside each, what to expect.

    .venv/bin/python benchmarks/growth.py BUNDLE --work WORK --json benchmarks/results/growth_cpu.json --chart docs/growth.svg

A step should cost what it reads: weights of the modalities that are present, once, and the cache's buffers, at the bandwidth
that memory gives. That is the law drawn beside each curve, with the bandwidth measured in the same run and nothing fitted.
Points of a curve take turns. For the sizes, models of the same shape and other widths are made in WORK, and removed.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import motrt
from motrt.benchmarks.document import leave, machine
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.config import AdapterExpert, ModelConfig, SwigluExpert
from motrt.model_def.initialize import init_checkpoint
from motrt.runtime.benchmark import cache_bytes_per_step, measure_bandwidth, weight_bytes_per_step
from motrt.runtime.bundle import Bundle, open_bundle
from motrt.runtime.kv_cache import KVCache
from motrt.runtime.session import Session

CONTEXTS, BATCHES, AUDIO_ROWS = (64, 256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16), (0, 2, 4, 6, 8)
WIDTHS = (512, 1024, 2048)
STEPS, ROUNDS = 3, 5


@dataclass
class Point:
    """One batch that goes on, a step at a time."""

    at: float
    label: str
    session: Session
    modalities: tuple[int, ...]
    cache: KVCache
    bundle: Bundle
    seconds: list[float] = field(default_factory=list)

    def steps(self, count: int) -> None:
        config = self.session.config
        names = [config.modality_names[index] for index in self.modalities]
        for _ in range(count):
            ids = [config.id_ranges[index][5] for index in self.modalities]
            started = time.perf_counter()
            self.session.decode_step(ids, names, self.cache)
            self.seconds.append(time.perf_counter() - started)

    def expected(self, bandwidth: float) -> float:
        """Seconds that reading takes: the buffers whole, because attention looks at their capacity."""
        capacity = np.full(self.cache.batch_size, self.cache.capacity)
        weights = weight_bytes_per_step(self.session, self.bundle.manifest.quantization, set(self.modalities))
        return (weights + cache_bytes_per_step(self.session, capacity)) / bandwidth


def point(at: float, label: str, session: Session, bundle: Bundle, modalities: Sequence[int], context: int) -> Point:
    """A batch of rows of ``modalities``, each with ``context`` tokens behind it."""
    config = session.config
    prompts = [[config.id_ranges[index][place % 64] for place in range(context)] for index in modalities]
    _, cache = session.prefill(prompts, [config.modality_names[index] for index in modalities])
    return Point(at, label, session, tuple(modalities), cache, bundle)


def measured(points: list[Point], bandwidth: Callable[[], float]) -> list[dict[str, Any]]:
    """Every point's step, in turns."""
    bandwidths = [bandwidth()]
    for one in points:
        one.steps(1)
        one.seconds.clear()
    for _ in range(ROUNDS):
        for one in points:
            one.steps(STEPS)
    middle = float(np.median([*bandwidths, bandwidth()]))
    told = []
    for one in points:
        low, median, high = np.percentile(one.seconds, [25, 50, 75]) * 1e3
        told.append(
            {
                "at": one.at,
                "case": one.label,
                "ms": round(float(median), 2),
                "ms_quartile_1": round(float(low), 2),
                "ms_quartile_3": round(float(high), 2),
                "ms_expected": round(one.expected(middle) * 1e3, 2),
                "rows": len(one.modalities),
            }
        )
    return told


def of_contexts(session: Session, bundle: Bundle) -> list[Point]:
    fitting = [count for count in CONTEXTS if count + STEPS * ROUNDS + 2 <= session.config.max_seq_len]
    names = session.config.modality_names
    return [
        point(count, name, session, bundle, [index], count - STEPS * ROUNDS // 2)
        for index, name in enumerate(names)
        for count in fitting
    ]


def of_batches(session: Session, bundle: Bundle) -> list[Point]:
    names = session.config.modality_names
    return [point(rows, name, session, bundle, [index] * rows, 16) for index, name in enumerate(names) for rows in BATCHES]


def of_shares(session: Session, bundle: Bundle) -> list[Point]:
    most = AUDIO_ROWS[-1]
    return [
        point(audio / most, f"{most} rows", session, bundle, [0] * (most - audio) + [1] * audio, 16) for audio in AUDIO_ROWS
    ]


def narrower(config: ModelConfig, width: int) -> ModelConfig:
    """The same model with everything that scales with its width scaled; the vocabulary stays."""
    share = width / config.model_width
    text, audio = config.modalities[0], config.modalities[1]
    assert isinstance(text.expert, SwigluExpert) and isinstance(audio.expert, AdapterExpert)
    narrow = (
        SwigluExpert(int(text.expert.hidden_size * share)),
        AdapterExpert(int(audio.expert.width * share), int(audio.expert.hidden_size * share)),
    )
    modalities = tuple(type(one)(**{**vars(one), "expert": expert}) for one, expert in zip((text, audio), narrow, strict=True))
    heads = int(config.num_heads * share)
    return config.replace(
        model_width=width, num_heads=heads, num_kv_heads=max(1, int(config.num_kv_heads * share)), modalities=modalities
    )


def of_width(bundle: Bundle, work: Path, width: int) -> list[dict[str, Any]]:
    """A step of each modality of a model so wide; one model is open at a time, because their threads would share the cores."""
    small = bundle
    if width != bundle.config.model_width:
        checkpoint = work / f"model-{width}"
        init_checkpoint(checkpoint, narrower(bundle.config, width), "bfloat16")
        small = export_bundle(checkpoint, work / f"bundle-{width}", bundle.manifest.weights, verify=False).bundle
    with motrt.load(small.path, "onnxruntime") as session:
        names = small.config.modality_names
        return measured(
            [point(width, name, session, small, [index], 16) for index, name in enumerate(names)], measure_bandwidth
        )


TITLES = {
    "context": "context (tokens)",
    "batch": "batch (rows)",
    "audio_share": "share of audio rows",
    "width": "model width",
}


def draw(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A panel for each curve; the expected law dashed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "motrt"
    figure, panels = pyplot.subplots(1, len(curves), figsize=(15, 3.6), constrained_layout=True)
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        for colour, case in zip(("#1f6f8b", "#d08c3c"), dict.fromkeys(one["case"] for one in points), strict=False):
            mine = [one for one in points if one["case"] == case]
            at = [one["at"] for one in mine]
            panel.plot(at, [one["ms"] for one in mine], marker="o", color=colour, label=case)
            panel.plot(at, [one["ms_expected"] for one in mine], linestyle="--", color=colour, alpha=0.6)
        panel.set_xlabel(TITLES[name])
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ms a step; dashed: reading")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


PATH = click.Path(path_type=Path)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--work", type=PATH, required=True, help="A new folder for smaller models; removed at the end.")
@click.option("--json", "json_file", type=PATH)
@click.option("--chart", type=PATH)
def main(bundle: Path, work: Path, json_file: Path | None, chart: Path | None) -> None:
    """Measure every curve; one JSON document last."""
    opened, curves = open_bundle(bundle), {}
    if len(opened.config.modalities) < 2:
        raise click.UsageError(f"{bundle} has one modality: there is no share of audio rows to measure")
    if work.exists():
        raise click.UsageError(f"{work} is there already: name a new folder, because it is removed at the end")
    work.mkdir(parents=True)
    try:
        with motrt.load(bundle, "onnxruntime") as session:
            for name, points in (("context", of_contexts), ("batch", of_batches), ("audio_share", of_shares)):
                curves[name] = measured(points(session, opened), measure_bandwidth)
                click.echo(f"{name}: {[(one['at'], one['case'], one['ms'], one['ms_expected']) for one in curves[name]]}")
        curves["width"] = [told for width in WIDTHS for told in of_width(opened, work, width)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    document = {
        "machine": machine("motrt", "onnxruntime", "numpy"),
        "weights": opened.manifest.weights,
        "curves": curves,
    }
    if chart is not None:
        draw(curves, chart)
    leave(document, json_file)


if __name__ == "__main__":
    main()

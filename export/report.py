"""What people see of long work and its results: progress bars and tables. The numbers come from elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from motrt.export.steps import Advance, Steps, Unit

COLOURS = {"PASS": "green", "AMBIGUOUS": "yellow", "FAIL": "bold red", "SKIPPED": "dim"}

MOST_ROWS = 40
MOST_PARTS = 8


class DrawnSteps(Steps):
    """Steps with a bar each where the console is a terminal, and a line each where it is not.

    Args:
        console: where to draw; standard error, so that results can be piped.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    @contextmanager
    def drawn(self, title: str, total: int | None, unit: Unit) -> Iterator[Advance]:
        """A bar that is gone when the step is done; the line that stays says how long it took. No bar in a file."""
        started = time.perf_counter()
        columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
        if total:
            columns[2:2] = [BarColumn(), DownloadColumn() if unit == "bytes" else TaskProgressColumn()]
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(title, total=total)
            yield lambda count: bars.advance(task, count)
        self.console.print(f"[dim]{escape(title)}: {time.perf_counter() - started:.1f} s[/dim]")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; columns whose name ends in ``>`` are numbers, right-aligned."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(printable(str(cell))) for cell in row))
    return made


def printable(text: str) -> str:
    """``text`` without characters that would command a terminal: names in files and a model's words are not ours."""
    return "".join(one if one in "\n\t" or one.isprintable() else f"\\x{ord(one):02x}" for one in text)


def size(num_bytes: float) -> str:
    """Bytes in the unit that people would say."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:.0f} B" if units[0] == "B" else f"{num_bytes:.2f} {units[0]}"


def parity_table(report: Mapping[str, Any]) -> Table:
    """Every finding of a parity report, with the figures that people look at; of derived graphs, what is not simply well."""
    made = Table(
        title=f"{report['backend']} against {report['reference']}",
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for name in ("rung", "question", "outcome"):
        made.add_column(name)
    made.add_column("relative L2", justify="right")
    made.add_column("limit", justify="right")
    made.add_column("detail", overflow="fold")
    for one in _gathered_by_graph(report["findings"]):
        figures, colour = one["figures"], COLOURS[one["outcome"]]
        made.add_row(
            one["rung"],
            escape(one["question"]),
            f"[{colour}]{one['outcome']}[/{colour}]",
            _short(figures.get("relative_l2_max")),
            _short(figures.get("limit")),
            escape(printable(one["detail"] or _more(figures))),
        )
    return made


def bisect_table(bisect: Mapping[str, Any]) -> Table:
    """Every part's error against its budget; of a graph that is well, the closest to it."""
    closest = sorted(bisect["parts"], key=lambda one: -_share(one))[:MOST_PARTS]
    shown = [one for one in bisect["parts"] if one in closest]  # in the order in which they compute
    rows = [
        (one["layer"], one["part"], one["modality"] or "", _short(one["error"]), _short(one["budget"]), f"{_share(one):.0%}")
        for one in shown
    ]
    return table(
        f"parts of {bisect['graph']}, the {len(shown)} closest to their budgets or over",
        ["place", "part", "modality", "relative L2>", "budget>", "of it>"],
        rows,
    )


def _share(one: Mapping[str, Any]) -> float:
    return float(one["error"]) / float(one["budget"])


def _gathered_by_graph(findings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A derived graph's passed questions as one line a rung, with the worst figure; everything else as it is."""
    lines: list[Mapping[str, Any]] = []
    passed: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in findings:
        if one["graph"] == "model":
            lines.append(one)
        elif one["outcome"] == "PASS":
            passed.setdefault((one["graph"], one["rung"]), []).append(one["figures"])
        else:
            lines.append({**one, "question": f"{one['graph']}: {one['question']}"})
    for (graph, rung), figures in passed.items():
        compared = [one for one in figures if "relative_l2_max" in one]
        worst = max(compared, key=lambda one: float(one["relative_l2_max"])) if compared else {}
        shown = {name: worst[name] for name in ("relative_l2_max", "limit") if name in worst}
        question = f"{graph}: {len(figures)} questions"
        lines.append({"rung": rung, "question": question, "outcome": "PASS", "detail": "", "figures": shown})
    return lines


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value or "")


def _more(figures: Mapping[str, Any]) -> str:
    """What else is worth a glance, where all is well."""
    if "kl_mean" in figures:
        return f"KL {figures['kl_mean']:.2g} nats of {figures['kl_limit']:g}, perplexity x {figures['perplexity_ratio']:.3f}"
    if "max_abs" in figures:
        return f"{figures['rows']} rows, max abs {figures['max_abs']:.2g}, KL {figures['kl_max']:.2g}"
    words = {"positions": "positions", "tokens": "tokens", "weights": "weights", "poisoned": "weights poisoned"}
    return ", ".join(f"{figures[name]} {word}" for name, word in words.items() if name in figures)


def verdict_line(report: Mapping[str, Any]) -> str:
    colour = COLOURS[report["verdict"]]
    loss = report.get("loss")
    lost = "" if loss is None else f", loss [{'red' if loss == 'over' else 'green'}]{loss}[/] its budget"
    return f"[{colour}]{report['verdict']}[/{colour}]{lost} in {report['seconds']:.1f} s"


def seconds_table(seconds: Mapping[str, float]) -> Table:
    return table("steps", ["step", "seconds>"], [(title, f"{value:.1f}") for title, value in seconds.items()])


def accounting_tables(accounting: Mapping[str, Any]) -> list[Table]:
    """How many keys had each outcome, and by name those that were not simply loaded."""
    counts = table("keys", ["outcome", "number>"], list(accounting["counts"].items()))
    told = [row for row in accounting["rows"] if row["outcome"] != "loaded"]
    if not told:
        return [counts]
    rows = [(row["outcome"], row["key"], row["source"], row["detail"]) for row in _gathered(told)]
    return [counts, table("keys that were not simply loaded", ["outcome", "key", "source", "what and why"], rows)]


def _gathered(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows that say the same of many keys become one; faults stay one by one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        is_fault = row["outcome"] in ("missing", "unexpected", "misshapen")
        detail = row["key"] + row["detail"] if is_fault else row["detail"]
        groups.setdefault((row["outcome"], row["source"], detail), []).append(row["key"])
    return [
        {
            "outcome": outcome,
            "source": source,
            "detail": detail.removeprefix(keys[0]) if len(keys) == 1 else detail,
            "key": keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more",
        }
        for (outcome, source, detail), keys in groups.items()
    ]


def inspection_tables(found: Mapping[str, Any]) -> list[Table]:
    """Everything that ``inspect`` found, a table a subject."""
    made = [_overview(found)]
    if isinstance(found.get("parameters"), list):
        rows = [(r["part"], r["modality"], f"{r['parameters']:,}", size(r["bytes"]), r["stored"]) for r in found["parameters"]]
        made.append(table("parameters", ["part", "modality", "number>", "size>", ""], rows))
        steps = [
            (name, f"{found['parameters_read_per_step'][name]:,}", size(num_bytes))
            for name, num_bytes in found["bytes_read_per_step"].items()
        ]
        made.append(table("weights read by one decode step", ["modality", "parameters>", "size>"], steps))
    if "health" in found:
        problems = found["health"]["problems"] or ["nothing to remark: no NaN, no Inf, no constant rows"]
        made.append(table("health", [""], [(problem,) for problem in problems]))
    if "operators" in found:
        counts = sorted(found["operators"].items(), key=lambda one: (-one[1], one[0]))
        made.append(table("operators", [""], [(", ".join(f"{count} {name}" for name, count in counts),)]))
    if len(found.get("plan", ())) > 1:
        made.append(_plan_table(found["plan"]))
    made += [_engine_table(one) for one in found.get("engines", ())]
    made += [evaluation_table(one) for one in found.get("evaluations", ())]
    if "inputs" in found or "signature" in found:
        made.append(_signature(found.get("signature", found)))
    if "tensors" in found:
        tensors = [(one["name"], one["dtype"], one["shape"]) for one in found["tensors"][:MOST_ROWS]]
        more = len(found["tensors"]) - len(tensors)
        made.append(table("tensors", ["name", "dtype", "shape"], tensors + [(f"... and {more} more", "", "")] * bool(more)))
    if found.get("files"):
        # The hash below the name: a terminal of 80 columns then shows it in one piece.
        files = [(f"{one['name']}\n{one['sha256']}", size(one["bytes"])) for one in found["files"]]
        if "source" in found:
            files.append((f"the checkpoint that it was made of\n{found['source']['sha256']}", ""))
        made.append(table("files", ["name and sha256", "size>"], files))
    return made


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """How well a model predicts a text, by predicted modality; beside another model where there was one."""
    columns, is_compared = ["predicts", "ids>", "perplexity>"], evaluation["against"] is not None
    names = ("against_perplexity", "kl_mean", "kl_max", "top_1_agreement")
    if is_compared:
        columns += [f"of {evaluation['against']}>", "KL mean>", "KL max>", "same best id>"]
    rows = []
    for modality, one in evaluation["modalities"].items():
        row = [modality, one["predictions"], f"{one['perplexity']:.2f}"]
        if is_compared:
            against, mean, largest, same = (one[name] for name in names)
            row += [f"{against:.2f}", f"{mean:.2g}", f"{largest:.2g}", f"{same:.2%}"]
        rows.append(row)
    title = f"{evaluation['text']}, {evaluation['num_ids']} ids in chunks of {evaluation['context']}, {evaluation['backend']}"
    return table(title, columns, rows)


def _plan_table(plan: Sequence[Mapping[str, Any]]) -> Table:
    """The graphs, most special first: a pass takes the first that serves it."""
    rows = [
        (
            one["name"],
            one["tokens"],
            one["predicts"],
            f"{one['parameters']:,}",
            one["engine"] or one["file"],
            "" if one["engine_bytes"] is None else size(one["engine_bytes"]),
        )
        for one in plan
    ]
    return table("plan", ["graph", "tokens", "predicts", "weights read>", "runs as", "size>"], rows)


def _engine_table(engine: Mapping[str, Any]) -> Table:
    ranges = [(dim, f"{least} to {most}, best {best}") for dim, (least, best, most) in engine["ranges"].items()]
    layers = ", ".join(f"{count} {kind}" for kind, count in engine["layers"].items())
    parity = engine["parity"]["verdict"] if engine["parity"] else "not verified on a GPU"
    rows = [
        ("built by", f"{engine['flavour']}, {', '.join(f'{name} {one}' for name, one in engine['versions'].items())}"),
        ("for", ", ".join(engine["compute_capabilities"]) or "every GPU that the flavour supports"),
        ("built on", engine["gpu"] or "a machine without a GPU"),
        *ranges,
        ("layers", layers),
        ("seconds", f"{engine['seconds']:.1f}"),
        ("parity", parity),
    ]
    return table(f"engine {engine['file']}", ["", ""], rows)


def _overview(found: Mapping[str, Any]) -> Table:
    rows = [("kind", found["kind"]), ("path", found.get("path", ""))]
    rows += [("dtype", found["dtype"])] if "dtype" in found else []
    rows += [("opset", ", ".join(f"{name} {number}" for name, number in found["opsets"].items()))] if "opsets" in found else []
    if "total_parameters" in found:
        rows.append(("parameters", f"{found['total_parameters']:,}"))
    if "total_bytes" in found:
        rows.append(("size", size(found["total_bytes"])))
    if "stored" in found:
        rows.append(("stored", f"{found['stored']['parameters']:,} parameters, {size(found['stored']['bytes'])}"))
    dtypes = found.get("dtypes") or found.get("stored", {}).get("dtypes")
    if dtypes:
        rows.append(("tensors", ", ".join(f"{count} {name}" for name, count in dtypes.items())))
    rows += [("note", found["note"])] if "note" in found else []
    if "config" in found:
        rows += _configuration(found["config"])
    if "source" in found:
        rows.append(("made of", found["source"]["path"]))
    if "parity" in found:
        parity = found["parity"]
        rows.append(("parity", f"{parity['verdict']}, {parity['backend']}" if parity else "not verified"))
    if "answer" in found:
        rows.append(("known answer", f"of {found['answer']['reference']}" if found["answer"] else "none"))
    return table("what it is", ["", ""], rows)


def _configuration(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rope, scaling = config["rope"], config["rope"]["scaling"]
    rows = [
        ("layers", f"{config['num_layers']} of width {config['model_width']}"),
        ("heads", f"{config['num_heads']} query, {config['num_kv_heads']} key/value, size {config['head_size']}"),
        ("attention", "routed" if config["routed_attention"] else "shared by all modalities"),
        ("q/k norm", "yes" if config["qk_norm"] else "no"),
        ("output head", "tied to the embedding" if config["tied_embeddings"] else config["head"]),
        ("RoPE", f"theta {rope['theta']:g}, {rope['style']}, {'scaled' if scaling else 'not scaled'}"),
        ("longest sequence", str(config["max_seq_len"])),
    ]
    start = 0
    for one in config["modalities"]:
        end, expert = start + one["vocab_size"], one["expert"]
        sizes = ", ".join(f"{key} {value}" for key, value in expert.items() if key not in ("kind", "bias"))
        rows.append((one["name"], f"ids {start} to {end - 1}, {expert['kind']} expert ({sizes})"))
        start = end
    return rows


def _signature(signature: Mapping[str, Any]) -> Table:
    """Inputs and outputs; of the cache, which repeats itself, the first layer alone."""
    rows = []
    for role in ("inputs", "outputs"):
        for one in signature[role]:
            layer = one["name"].rpartition(".")[2]
            if not (layer.isdigit() and int(layer) > 0):
                rows.append((role[:-1], one["name"], one["dtype"], f"[{', '.join(map(str, one['dims']))}]"))
    return table("graph contract (caches: first layer only)", ["", "name", "dtype", "dims"], rows)

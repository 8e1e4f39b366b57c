"""Every fault of ``faults`` planted in a real bundle, and whether the gate sees it and the bisection says where.

    .venv/bin/python benchmarks/planted_faults.py --json benchmarks/results/planted_faults.json --markdown docs/gate.md

Exit code 1 where a fault went through, or a place was named wrongly.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from motrt.benchmarks.builds import traces_shared
from motrt.benchmarks.document import leave, machine
from motrt.benchmarks.examination import Examined, examine
from motrt.benchmarks.faults import BUILDS, FAULTS, KINDS, Fault
from motrt.benchmarks.gate_page import write_section

PATH = click.Path(path_type=Path)


def examine_all(faults: Sequence[Fault], work: Path, console: Console) -> list[Examined]:
    """Make the bundles that ``faults`` need, then examine one after another."""
    needed = [name for name in BUILDS if any(one.build == name or one.kind == "files" for one in faults)]
    found = []
    with Progress(console=console, transient=True) as progress, traces_shared():
        making = progress.add_task("exporting", total=len(needed))
        bundles = {}
        for number, name in enumerate(needed):
            folder = work / f"build-{number}"
            folder.mkdir()
            bundles[name] = BUILDS[name].make(folder)
            progress.advance(making)
        asking = progress.add_task("planting", total=len(faults))
        for number, fault in enumerate(faults):
            found.append(examine(fault, bundles, work / f"fault-{number}"))
            progress.advance(asking)
    return found


def verdict(one: Examined) -> str:
    if not one.is_caught:
        return "MISSED"
    return "caught" if one.is_named_right else "WRONG PLACE"


def table_of(found: Sequence[Examined]) -> Table:
    table = Table("kind", "fault", "bundle", "caught by", "without P1", "place named", "")
    for one in found:
        style = None if verdict(one) == "caught" else "bold red"
        cells = (one.fault.kind, one.fault.name, one.fault.build, " ".join(one.rungs), " ".join(one.rungs_above), one.named)
        table.add_row(*cells, verdict(one), style=style)
    return table


def document_of(found: Sequence[Examined]) -> dict[str, Any]:
    rungs = Counter(rung for one in found for rung in one.rungs)
    placed = [one for one in found if one.fault.place is not None or one.fault.weight is not None]
    return {
        "machine": machine("motrt", "onnxruntime", "torch"),
        "faults": len(found),
        "caught": sum(one.is_caught for one in found),
        "caught_by": dict(sorted(rungs.items())),
        "without_p1": sum(bool(one.rungs_above) for one in found),
        "with_a_place": len(placed),
        "place_named_right": sum(one.is_named_right for one in placed),
        "place_named_where_none_is": sum(not one.is_named_right for one in found if one not in placed),
        "found": [one.to_dict() for one in found],
    }


def markdown_of(document: dict[str, Any]) -> str:
    """What stands in the page."""
    told = {name: value for name, value in document.items() if isinstance(value, int)}
    lines = [
        "{caught} of {faults} faults were caught; {without_p1} of them would have been without P1, which compares what is "
        "stored. Of the {with_a_place} that have a place in the file, {place_named_right} were named right; where there is "
        "none, {place_named_where_none_is} times a part was named.".format(**told)
    ]
    for kind in KINDS:
        own = [one for one in document["found"] if one["kind"] == kind]
        if not own:
            continue
        lines += [
            "",
            f"### {kind.capitalize()}",
            "",
            "| planted | in | caught by | without P1 | place named |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['fault']} | {one['bundle']} | {', '.join(one['caught_by']) or '**missed**'} | "
            f"{', '.join(one['without_p1']) or '-'} | {one['named'] or '-'}{'' if one['place_is_right'] else ' **(wrong)**'} |"
            for one in own
        ]
    return "\n".join(lines)


@click.command()
@click.option("--only", multiple=True, help="Faults whose name or kind holds this; may be given again.")
@click.option("--json", "json_file", type=PATH)
@click.option("--markdown", type=PATH, help="A page with a section for this table.")
def main(only: tuple[str, ...], json_file: Path | None, markdown: Path | None) -> None:
    """Plant every fault; one JSON document last."""
    torch.set_num_threads(1)
    chosen = [one for one in FAULTS if not only or any(part in (one.kind, one.name) or part in one.name for part in only)]
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        found = examine_all(chosen, Path(folder), console)
    console.print(table_of(found))
    document = document_of(found)
    if markdown is not None:
        write_section(markdown, "planted faults", markdown_of(document))
    leave(document, json_file)
    sys.exit(0 if all(verdict(one) == "caught" for one in found) else 1)


if __name__ == "__main__":
    main()

"""What a benchmark leaves: one JSON document that says on what machine it was made, on the last line and in a file."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click


def machine(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of the packages that matter."""
    found = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    return found | {name: version_of(name) for name in packages}


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source, say
        return "not installed"


def leave(document: dict[str, Any], file: Path | None) -> None:
    """Print it as one line, and write it to ``file`` where one was named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(document))

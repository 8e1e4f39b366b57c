"""Arrays in the JSON that polygraphy's command line and library read: feeds, and the outputs of a runner."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def save_feeds(feeds: Sequence[Arrays], file: Path) -> None:
    """Inputs of several runs, for ``polygraphy run --load-inputs``."""
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it tells of every file on standard output, which is for results
        save_json([dict(one) for one in feeds], str(file))


def save_outputs(runner: str, outputs: Sequence[Arrays], file: Path) -> None:
    """Outputs of several runs, for ``polygraphy run --load-outputs`` and ``polygraphy.comparator.RunResults``."""
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.logger import G_LOGGER

    results = RunResults()
    results.append((runner, [IterationResult(outputs=dict(one), runner_name=runner) for one in outputs]))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results.save(str(file))

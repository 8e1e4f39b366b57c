"""What docs/graph-contract.md shows in plain onnxruntime, run as it stands there, against our session."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import motrt
from motrt.model_def.config import ModelConfig
from motrt.model_def.parameters import parameters
from motrt.runtime.bundle import open_bundle
from motrt.tests.export.models import ONE, TINY

MakeBundle = Callable[..., Path]

PAGE = Path(motrt.__file__).parent / "docs" / "graph-contract.md"
COPIES = "TensorScatter: in-place optimization not activated"
KEPT = """
np.save("said.npy", logits)
"""
UNBOUND = """
whole = {"input_ids": (1, 3), "modality_mask": (1, 3), "cache_position": 1, "logits_index": 1, "head_mask": 1}
feeds = {name: np.zeros(shape, np.int64) for name, shape in whole.items()}
caches = [one for one in session.get_inputs() if one.name.startswith("past_")]
session.run(None, feeds | {one.name: np.zeros((1, one.shape[1], 8, one.shape[3]), np.float32) for one in caches})
"""


def snippets() -> dict[str, str]:
    """The page's Python, by what tells each piece from the others."""
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    bound, quiet, counted = found
    assert "io_binding" in bound and "log_severity_level" in quiet and "Counter" in counted
    return {"bound": bound, "quiet": quiet, "counted": counted}


def run(code: str, folder: Path) -> tuple[str, str]:
    """Standard output, and all that was written to descriptor 2, onnxruntime's own words too."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def beside(make_bundle: MakeBundle, tmp_path: Path) -> Callable[..., Path]:
    """A folder in which a bundle is called ``bundle``, as the page has it."""

    def made(config: ModelConfig, precision: str) -> Path:
        (tmp_path / "bundle").symlink_to(make_bundle(config, precision))
        return tmp_path

    return made


@pytest.mark.parametrize("config", [ONE, TINY], ids=["one", "two"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_bound_cache_of_the_page_is_silent_and_says_what_our_session_says(
    config: ModelConfig, precision: str, beside: Callable[..., Path]
) -> None:
    folder = beside(config, precision)
    _, errors = run(snippets()["bound"] + KEPT, folder)
    assert errors == ""
    with motrt.load(folder / "bundle") as session:
        logits, cache = session.prefill([[1, 2, 3]], next_modality="text")
        for _ in range(5):
            logits = session.decode_step([int(logits[0].argmax())], next_modality="text", cache=cache)
    np.testing.assert_array_equal(np.load(folder / "said.npy"), logits)


def test_without_the_binding_every_layer_says_that_it_copies_and_the_page_says_how_to_quieten_it(
    beside: Callable[..., Path],
) -> None:
    """Were there no such words, silence would show nothing."""
    folder, told = beside(TINY, "fp32"), snippets()
    loud = told["quiet"].replace("options.log_severity_level = 3", "pass")
    _, errors = run("import numpy as np\n" + loud + UNBOUND, folder)
    assert errors.count(COPIES) == 2 * TINY.num_layers
    assert run("import numpy as np\n" + told["quiet"] + UNBOUND, folder)[1] == ""


@pytest.mark.parametrize("config", [ONE, TINY], ids=["one", "two"])
def test_the_page_counts_one_product_for_every_weight_of_codes(config: ModelConfig, beside: Callable[..., Path]) -> None:
    folder = beside(config, "int4")
    manifest = open_bundle(folder / "bundle").manifest
    assert manifest.quantization is not None
    coded = [one for one in manifest.quantization.coded_weights(parameters(manifest.config)) if not one.is_table]
    said, errors = run(snippets()["counted"], folder)
    assert f"'MatMulNBits': {len(coded)}" in said and errors == ""

"""A trained model out of a GGUF file says what it was trained to say. Needs a folder that benchmarks/smollm2.py has made."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import motrt
from motrt.model_def.checkpoint.native import open_checkpoint

WORK = os.environ.get("MOTRT_SMOLLM2")
pytestmark = pytest.mark.skipif(WORK is None, reason="MOTRT_SMOLLM2 names no folder that benchmarks/smollm2.py has made")


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return Path(WORK or "") / "model"


# As the model's own tokenizer gives them.
PUBLISHED_IDS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
}


@pytest.mark.parametrize("text", PUBLISHED_IDS)
def test_texts_have_the_ids_of_the_models_own_tokenizer(text: str, checkpoint: Path) -> None:
    assert Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids == PUBLISHED_IDS[text]


def test_the_configuration_is_smollm2s(checkpoint: Path) -> None:
    config = open_checkpoint(checkpoint).config
    assert (config.num_layers, config.model_width, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.rope.theta, config.norm_eps, config.tied_embeddings) == (49152, 1e5, 1e-5, True)


def test_it_knows_the_capital_of_france(checkpoint: Path) -> None:
    with motrt.load(checkpoint, backend="torch") as session:
        text = "".join(step.text for step in session.generate("The capital of France is", max_tokens=2))
    assert text.startswith(" Paris")

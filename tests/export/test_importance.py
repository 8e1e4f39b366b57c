"""What products read: measured as anybody would, and sampled from every model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from motrt.errors import InputError
from motrt.export.importance import (
    FILE_ROW,
    NUM_ROWS,
    _WatchedDecoder,
    measure_importance,
    num_passes,
    rows_of_file,
    sample_rows,
)
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import EMBEDDING, parameters
from motrt.tests.export.models import ONE, THREE, TIED, TINY

MakeCheckpoint = Callable[[ModelConfig], Path]


def measured(config: ModelConfig, rows: torch.Tensor | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """What was measured, the weights, and the elements that were read."""
    weights, told = dict(random_tensors(config, 0)), [0]

    def advance(count: int) -> None:
        told[0] += count

    return measure_importance(config, weights.__getitem__, rows, advance), weights, told[0]


def test_it_is_the_mean_square_of_what_a_product_reads() -> None:
    rows = torch.randint(0, TINY.vocab_size, (3, 10), generator=torch.Generator().manual_seed(1))
    found, weights, _ = measured(TINY, rows)
    first = F.rms_norm(weights[EMBEDDING][rows], (TINY.model_width,), weights["layers.0.attention_norm.weight"], TINY.norm_eps)
    is_text = rows < TINY.modalities[0].vocab_size
    for modality, mine in (("text", is_text), ("audio", ~is_text)):
        expected = first[mine].square().mean(0)
        for name in ("wq", "wk", "wv"):
            torch.testing.assert_close(found[f"layers.0.attention.{name}.{modality}.weight"], expected)
    decoder, seen = Decoder.from_tensors(TINY, weights.__getitem__), []
    hidden = decoder.get_submodule("layers.1.feed_forward.text.w2")
    hidden.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    start, wanted = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        decoder(rows, (~is_text).long(), start, wanted, wanted, decoder.new_cache(3, 10))
    torch.testing.assert_close(found["layers.1.feed_forward.text.w2.weight"], seen[0].square().mean(0))


def test_what_no_token_went_through_has_no_importance() -> None:
    found, _, _ = measured(TINY, torch.zeros(2, 6, dtype=torch.int64))
    assert {one.name for one in parameters(TINY) if len(one.shape) == 2 and one.modality == "text"} <= found.keys()
    assert not [name for name in found if "audio" in name] and EMBEDDING not in found


@pytest.mark.parametrize("config", [ONE, TINY, TIED, THREE], ids=["one", "two", "tied", "three"])
def test_every_model_says_sequences_of_its_own_each_modality_alone_and_all_in_order(config: ModelConfig) -> None:
    weights = dict(random_tensors(config, 0))
    rows, again = (sample_rows(_WatchedDecoder(config, weights.__getitem__, torch.float32)) for _ in range(2))
    assert torch.equal(rows, again) and len(rows) == NUM_ROWS
    count = len(config.modalities)
    for number, row in enumerate(rows.tolist()):
        for place, one in enumerate(row):
            assert one in config.id_ranges[number if number < count else place * count // len(row)]
    found, _, told = measured(config, None)
    alone, _, _ = measured(config, rows)  # what was read to draw them counts for nothing
    assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in found)
    assert {name for name in found if "wq" in name} and told == num_passes(None) * sum(one.numel for one in parameters(config))


def test_it_is_the_model_that_says_them() -> None:
    """A model without layers to speak of, whose head gives the id behind the token at a position the best logit by far."""
    weights, m = dict(random_tensors(ONE, 0)), ONE.model_width
    for name in weights:
        if name.endswith(("wo.text.weight", "w2.weight", "w2.bias")):
            weights[name] = torch.zeros_like(weights[name])
    weights["norm.weight"] = torch.ones(m)
    ids = torch.arange(ONE.vocab_size)
    weights[EMBEDDING] = F.one_hot(ids % m, m).float()
    weights["output.weight"] = torch.zeros(ONE.vocab_size, m)
    weights["output.weight"][1 : m + 1] = 100 * torch.eye(m)
    rows = sample_rows(_WatchedDecoder(ONE, weights.__getitem__, torch.float32))
    assert torch.equal(rows[:, 2::2], rows[:, 1:-1:2] % m + 1)  # the last round draws every second token
    assert torch.equal(rows[:, 1], rows[:, 0] % m + 1)


def test_a_files_sequences_are_cut_into_rows(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, checkpoint = tmp_path / "ids.jsonl", open_checkpoint(tiny_checkpoint)
    length = min(FILE_ROW, checkpoint.config.max_seq_len)
    lines = [[3] * (length - 2), [4] * 5]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert rows_of_file(file, checkpoint).tolist() == [[3] * (length - 2) + [4] * 2]
    file.write_text(json.dumps([5, 6, 7]))
    assert rows_of_file(file, checkpoint).tolist() == [[5, 6, 7]]
    file.write_text(json.dumps({"text": "Say hello."}))
    with pytest.raises(InputError, match="tokenizer"):
        rows_of_file(file, checkpoint)

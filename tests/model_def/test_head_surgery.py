"""Heads are cut and joined exactly: the same rows, the same logits."""

import pytest
import torch

from motrt.errors import ConfigError
from motrt.model_def.config import HeadKind, ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import SHARED_HEAD, parameters

SPLIT = ModelConfig.tiny()
SHARED = SPLIT.replace(head="shared")
TIED = SHARED.replace(tied_embeddings=True)
TEXT = SHARED.replace(modalities=SHARED.modalities[:1])


def logits_of(config: ModelConfig, read: Read) -> torch.Tensor:
    """Logits of a mixed sequence, float64: [n, v]."""
    ids = torch.tensor([[1, 5, 40, 95, *config.id_ranges[-1][-4:]]])
    mask = torch.tensor([[config.modality_of(int(token)) for token in ids[0]]])
    predicted = torch.arange(8) % len(config.modalities)
    decoder = Decoder.from_tensors(config, read, torch.float64)
    logits, _ = decoder(ids, mask, torch.zeros(1, dtype=torch.int64), torch.arange(8), predicted, decoder.new_cache(1, 8))
    return torch.as_tensor(logits)


def weights_of(config: ModelConfig) -> Read:
    return dict(random_tensors(config, 1)).__getitem__


@pytest.mark.parametrize(("config", "head"), [(SPLIT, "shared"), (SHARED, "split"), (TIED, "split"), (TEXT, "split")])
def test_logits_stay_the_same(config: ModelConfig, head: HeadKind) -> None:
    read = weights_of(config)
    new_config, new_read = with_head(config, read, head)
    assert (new_config.head, new_config.tied_embeddings) == (head, False)
    assert all(tuple(new_read(p.name).shape) == p.shape for p in parameters(new_config))
    # The rows are the same; the product may sum them in another order.
    torch.testing.assert_close(logits_of(new_config, new_read), logits_of(config, read), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SPLIT, SHARED])
def test_there_and_back_gives_the_same_bits(config: ModelConfig) -> None:
    read = weights_of(config)
    there = with_head(config, read, "shared" if config.head == "split" else "split")
    back_config, back_read = with_head(*there, config.head)
    assert back_config == config
    assert all(torch.equal(back_read(p.name), read(p.name)) for p in parameters(config))


def test_cut_rows_do_not_keep_the_whole_head_in_memory() -> None:
    _, read = with_head(SHARED, weights_of(SHARED), "split")
    piece = read("output.audio.weight")
    assert piece.untyped_storage().nbytes() == piece.nbytes


def test_nothing_is_read_until_it_is_asked_for() -> None:
    asked: list[str] = []
    inner = weights_of(SHARED)

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return inner(name)

    _, new_read = with_head(SHARED, read, "split")
    assert asked == []
    new_read("output.audio.weight")
    assert asked == [SHARED_HEAD]


@pytest.mark.parametrize("config", [SPLIT, SHARED, TIED])
def test_a_head_that_is_already_so_is_left_alone(config: ModelConfig) -> None:
    read = weights_of(config)
    assert with_head(config, read, config.head) == (config, read)


def test_another_kind_of_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="'split' or 'shared' \\('both' came\\)"):
        with_head(SPLIT, weights_of(SPLIT), "both")  # type: ignore[arg-type]

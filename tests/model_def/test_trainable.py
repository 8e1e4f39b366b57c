"""Freeze policies train exactly what they say, and the broken one is told from those that can teach a modality."""

import pytest
import torch

from motrt.errors import ConfigError
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.model_def.trainable import POLICIES, Policy, apply_policy, can_learn, count, trainable_parameters

FULL = ModelConfig.preset("llama-3.2-1b")
FULL_SHARED = FULL.replace(head="shared")
FULL_TIED = FULL_SHARED.replace(tied_embeddings=True)

# Computed here from the sizes of the model, not by the code under test.
ADAPTERS = 16 * (2048 * 1024 + 1024 * 2048)
HEAD = (128256 + 2048) * 2048
AUDIO_ROWS = 2048 * 2048

SPLIT = ModelConfig.tiny()
SHARED = SPLIT.replace(head="shared")
TIED = SHARED.replace(tied_embeddings=True)


@pytest.mark.parametrize(
    ("config", "policy", "expected"),
    [
        (FULL, "adapters", ADAPTERS),
        (FULL, "adapters+head", ADAPTERS + HEAD),
        (FULL_SHARED, "adapters+head", ADAPTERS + HEAD),
        (FULL_TIED, "adapters+head", ADAPTERS + HEAD),
        (FULL, "adapters+new-rows", ADAPTERS + 2 * AUDIO_ROWS),
        (FULL_SHARED, "adapters+new-rows", ADAPTERS + 2 * AUDIO_ROWS),
        (FULL_TIED, "adapters+new-rows", ADAPTERS + AUDIO_ROWS),
        (FULL, "adapters+audio-head", ADAPTERS + AUDIO_ROWS),
    ],
)
def test_full_size_counts_are_exact(config: ModelConfig, policy: Policy, expected: int) -> None:
    assert count(config, policy) == expected


def test_the_numbers_in_the_documentation_are_these() -> None:
    assert (ADAPTERS, HEAD, AUDIO_ROWS, 2 * AUDIO_ROWS) == (67_108_864, 266_862_592, 4_194_304, 8_388_608)


def _loss(decoder: Decoder) -> torch.Tensor:
    """A number that depends on every weight that a mixed sequence uses, text and audio predicted."""
    ids = torch.tensor([[1, 2, 3, 96, 97, 127]])
    mask = (ids >= 96).long()
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    start = torch.zeros(1, dtype=torch.int64)
    logits, _ = decoder(ids, mask, start, torch.arange(6), predicted, decoder.new_cache(1, 6))
    return torch.as_tensor(torch.logsumexp(logits, dim=-1).sum())


def _changed(config: ModelConfig, policy: Policy) -> dict[str, int]:
    """How many elements of each parameter have a gradient, found by training rather than by counting."""
    decoder = Decoder.from_tensors(config, dict(random_tensors(config, 0)).__getitem__)
    apply_policy(decoder, config, policy)
    _loss(decoder).backward()  # type: ignore[no-untyped-call]
    return {name: int((p.grad != 0).sum()) for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("config", [SPLIT, SHARED, TIED], ids=["split", "shared", "tied"])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_moves_what_the_policy_names_and_nothing_else(config: ModelConfig, policy: Policy) -> None:
    if policy == "adapters+audio-head" and config.head != "split":
        with pytest.raises(ConfigError, match="needs a split head"):
            trainable_parameters(config, policy)
        return
    changed, expected = _changed(config, policy), trainable_parameters(config, policy)
    assert changed.keys() == expected.keys()
    for name, number in changed.items():
        if name == "tok_embeddings.weight" and not config.tied_embeddings:
            assert number == 3 * 64  # the rows of the three audio ids that were read
        else:
            assert number == expected[name]


def test_a_masked_table_keeps_its_text_rows_bit_for_bit() -> None:
    decoder = Decoder.from_tensors(SHARED, dict(random_tensors(SHARED, 0)).__getitem__)
    apply_policy(decoder, SHARED, "adapters+new-rows")
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    _loss(decoder).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    after = decoder.state_dict()
    for table in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(before[table][:96], after[table][:96])
        assert not torch.equal(before[table][96:], after[table][96:])


def test_a_second_policy_replaces_the_first() -> None:
    decoder = Decoder.from_tensors(TIED, dict(random_tensors(TIED, 0)).__getitem__)
    apply_policy(decoder, TIED, "adapters+new-rows")
    apply_policy(decoder, TIED, "adapters+head")
    _loss(decoder).backward()  # type: ignore[no-untyped-call]
    gradient = decoder.tok_embeddings.weight.grad
    assert gradient is not None and bool(gradient[:96].any())


@pytest.mark.parametrize(
    ("config", "policy", "text", "audio"),
    [
        (SPLIT, "adapters", False, False),
        (SPLIT, "adapters+head", True, True),
        (SHARED, "adapters+head", True, True),
        (SPLIT, "adapters+new-rows", False, True),
        (SHARED, "adapters+new-rows", False, True),
        (TIED, "adapters+new-rows", False, True),
        (SPLIT, "adapters+audio-head", False, True),
    ],
)
def test_a_modality_is_learnt_only_where_its_head_rows_move(
    config: ModelConfig, policy: Policy, text: bool, audio: bool
) -> None:
    assert (can_learn(config, policy, "text")[0], can_learn(config, policy, "audio")[0]) == (text, audio)


def test_the_broken_policy_says_which_rows_it_never_changes() -> None:
    learns, reason = can_learn(FULL, "adapters", "audio")
    assert not learns
    assert "never changes the audio rows of the head (128256 to 130303)" in reason


def test_a_frozen_embedding_is_told() -> None:
    assert "must not be zero" in can_learn(SPLIT, "adapters+audio-head", "audio")[1]
    assert "must not be zero" not in can_learn(SPLIT, "adapters+new-rows", "audio")[1]


def test_what_can_not_be_trained_so_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy must be one of adapters, "):
        count(SPLIT, "everything")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="this model has none"):
        count(SHARED.replace(modalities=SHARED.modalities[:1]), "adapters")
    with pytest.raises(ConfigError, match="no modality 'video'"):
        can_learn(SPLIT, "adapters", "video")
    with pytest.raises(ConfigError, match=r"it has no parameter layers\.0"):
        apply_policy(torch.nn.Linear(2, 2), SPLIT, "adapters")

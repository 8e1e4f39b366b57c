"""A model that is given a modality says of text what it said before, bit for bit, and starts the new one as it should."""

from collections.abc import Callable
from math import log

import pytest
import torch

from motrt.errors import ConfigError
from motrt.model_def.config import AdapterExpert, Modality, ModelConfig, SwigluExpert
from motrt.model_def.decoder import Decoder
from motrt.model_def.expansion import with_modality
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.health import diagnose
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import EMBEDDING, parameters

WHOLE = ModelConfig.tiny()
TEXT, AUDIO = WHOLE.modalities
TIED = WHOLE.replace(modalities=(TEXT,), head="shared", tied_embeddings=True)
SHARED = TIED.replace(tied_embeddings=False)
SPLIT = SHARED.replace(head="split")
SHARED_ATTENTION = SPLIT.replace(routed_attention=False, qk_norm=True)
TRUNKS = pytest.mark.parametrize(
    "config",
    [TIED, SHARED, SPLIT, SHARED_ATTENTION, SPLIT.replace(qk_norm=True)],
    ids=["tied", "shared", "split", "one", "norms"],
)
TEXT_IDS = list(range(1, 20))


def reads(config: ModelConfig) -> Read:
    return dict(random_tensors(config, 3)).__getitem__


def logits(config: ModelConfig, read: Read, ids: list[int], predicted: int) -> torch.Tensor:
    """[s, v], every position predicting the same modality."""
    decoder = Decoder.from_tensors(config, read)
    b, s = 1, len(ids)
    mask = torch.tensor([[config.modality_of(one) for one in ids]])
    start = torch.zeros(b, dtype=torch.int64)
    head = torch.full((s,), predicted)
    found, _ = decoder(torch.tensor([ids]), mask, start, torch.arange(s), head, decoder.new_cache(b, s))
    return torch.as_tensor(found)


@TRUNKS
def test_every_weight_of_the_grown_model_has_its_shape_and_the_old_ones_are_kept_bit_for_bit(config: ModelConfig) -> None:
    read = reads(config)
    grown, read_grown = with_modality(config, read, AUDIO)
    assert grown.modality_names == ("text", "audio")
    for parameter in parameters(grown):
        assert tuple(read_grown(parameter.name).shape) == parameter.shape, parameter.name
    for parameter in parameters(config):
        assert torch.equal(read(parameter.name), read_grown(parameter.name)[: parameter.shape[0]]), parameter.name


@TRUNKS
def test_text_logits_do_not_change(config: ModelConfig) -> None:
    read = reads(config)
    before = logits(config, read, TEXT_IDS, 0)
    after = logits(*with_modality(config, read, AUDIO), TEXT_IDS, 0)
    assert torch.equal(before, after[:, : config.vocab_size])
    assert bool(after[:, config.vocab_size :].isneginf().all())


@pytest.mark.parametrize("config", [SHARED, SPLIT], ids=["shared", "split"])
def test_each_new_id_is_as_likely_as_any_other(config: ModelConfig) -> None:
    grown, read = with_modality(config, reads(config), AUDIO)
    found = logits(grown, read, [*TEXT_IDS, 96, 97], 1)[:, 96:]
    assert torch.equal(found, torch.zeros_like(found))
    loss = torch.nn.functional.cross_entropy(found, torch.zeros(len(found), dtype=torch.int64))
    assert float(loss) == pytest.approx(log(AUDIO.vocab_size))


@pytest.mark.parametrize("expert", [AUDIO.expert, SwigluExpert(24), SwigluExpert(24, bias=True)])
def test_the_new_expert_adds_nothing_at_first_but_what_a_last_bias_adds(expert: AdapterExpert | SwigluExpert) -> None:
    grown, read = with_modality(SPLIT, reads(SPLIT), Modality("audio", 32, expert))
    layer = Decoder.from_tensors(grown, read).layers[0]
    added = layer.get_submodule("feed_forward.audio")(torch.randn(5, 64))
    assert torch.equal(added, torch.zeros_like(added)) or (isinstance(expert, SwigluExpert) and expert.bias)


def test_attention_is_a_copy_of_the_texts() -> None:
    _, read = with_modality(SPLIT, reads(SPLIT), AUDIO)
    for name in ("wq", "wk", "wv", "wo"):
        copied, original = (read(f"layers.1.attention.{name}.{route}.weight") for route in ("audio", "text"))
        assert torch.equal(copied, original)


def test_new_rows_of_the_embedding_are_rows_that_are_there_none_twice_while_there_are_enough() -> None:
    known = [tuple(row) for row in reads(SPLIT)(EMBEDDING).tolist()]
    many = Modality("audio", 150, AUDIO.expert)
    rows = [tuple(row) for row in with_modality(SPLIT, reads(SPLIT), many)[1](EMBEDDING)[96:].tolist()]
    assert set(rows[:96]) == set(known) and rows[:96] != known
    assert len(set(rows[96:])) == 54 and set(rows[96:]) < set(known)


def test_rows_drawn_at_random_lie_among_those_that_are_there() -> None:
    def read(name: str) -> torch.Tensor:
        return reads(SPLIT)(name) * 0.5 + 3.0 if name == EMBEDDING else reads(SPLIT)(name)

    many = Modality("audio", 4096, AUDIO.expert)
    rows = with_modality(SPLIT, read, many, "random")[1](EMBEDDING)[96:]
    known = read(EMBEDDING)
    assert torch.allclose(rows.mean(dim=0), known.mean(dim=0), atol=0.05)
    assert torch.allclose(rows.std(dim=0), known.std(dim=0), rtol=0.05)
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_a_seed_decides_what_is_drawn() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        read = with_modality(SPLIT, reads(SPLIT), AUDIO, seed=seed)[1]
        return [read(EMBEDDING)[96:], read("layers.0.feed_forward.audio.down_proj.weight")]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert not any(map(torch.equal, drawn(1), drawn(2)))


def test_zero_rows_are_found_untrained_in_both_tables() -> None:
    def untrained(embedding: str) -> list[str]:
        health = diagnose(*with_modality(SPLIT, reads(SPLIT), AUDIO, embedding))  # type: ignore[arg-type]
        return [rows.table for rows in health.untrained]

    assert untrained("zero") == [EMBEDDING, "output.audio.weight"]
    assert untrained("random") == untrained("copied") == ["output.audio.weight"]


@pytest.mark.parametrize("order", ["head first", "modality first"])
def test_a_head_can_be_split_before_or_after(order: str) -> None:
    read = reads(SHARED)
    steps: dict[str, Callable[[], tuple[ModelConfig, Read]]] = {
        "head first": lambda: with_modality(*with_head(SHARED, read, "split"), AUDIO),
        "modality first": lambda: with_head(*with_modality(SHARED, read, AUDIO), "split"),
    }
    grown, read_grown = steps[order]()
    assert grown == WHOLE
    assert torch.equal(read_grown("output.text.weight"), read("output.weight"))
    assert not read_grown("output.audio.weight").any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedding must be one of copied, random, zero \\('ones' came\\)"):
        with_modality(SPLIT, reads(SPLIT), AUDIO, "ones")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="different names"):
        with_modality(WHOLE, reads(WHOLE), AUDIO)

"""Laws of the PyTorch decoder. That its numbers are right, ``tests/export`` says with an independent implementation."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from motrt.model_def.config import Modality, ModelConfig, SwigluExpert
from motrt.model_def.decoder import Cache, Decoder, decode, prefill, state_of
from motrt.model_def.head_surgery import with_head
from motrt.model_def.initialize import random_tensors
from motrt.model_def.parameters import parameters
from motrt.model_def.trainable import Policy, apply_policy

TINY = ModelConfig.tiny()
ONE = TINY.replace(modalities=TINY.modalities[:1], head="shared")
THREE = TINY.replace(
    modalities=(*TINY.modalities, Modality("picture", 17, SwigluExpert(24, bias=True))), qk_norm=True, routed_attention=True
)
VARIANTS = {
    "tiny": TINY,
    "shared head": TINY.replace(head="shared"),
    "tied": TINY.replace(head="shared", tied_embeddings=True),
    "attention not routed": TINY.replace(routed_attention=False, qk_norm=True),
    "one modality": ONE,
    "one modality, split head": ONE.replace(head="split"),
    "three modalities": THREE,
}


def decoder_of(config: ModelConfig, seed: int = 0) -> Decoder:
    return Decoder.from_tensors(config, dict(random_tensors(config, seed)).__getitem__, torch.float64)


def sequence(config: ModelConfig, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [rows, length] of all modalities in turn, and their mask."""
    chance = torch.Generator().manual_seed(seed)
    mask = torch.randint(len(config.modalities), (rows, length), generator=chance)
    starts = torch.tensor([ids.start for ids in config.id_ranges])
    sizes = torch.tensor([len(ids) for ids in config.id_ranges])
    return starts[mask] + (torch.rand(rows, length, generator=chance) * sizes[mask]).long(), mask


def whole(decoder: Decoder, ids: Tensor, mask: Tensor, head: Tensor | None = None, capacity: int = 32) -> tuple[Tensor, Cache]:
    """Every position's logits [b * s, v] in one pass over an empty cache."""
    b, s = ids.shape
    wanted = torch.arange(b * s)
    head = torch.zeros_like(wanted) if head is None else head
    logits, cache = decoder(ids, mask, torch.zeros(b, dtype=torch.int64), wanted, head, decoder.new_cache(b, capacity))
    return logits, cache


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_steps_equal_one_full_pass(name: str) -> None:
    config = VARIANTS[name]
    decoder = decoder_of(config)
    ids, mask = sequence(config, 2, 9)
    head = torch.arange(18) % len(config.modalities)
    expected = whole(decoder, ids, mask, head)[0].view(2, 9, -1)
    logits, cache = prefill(decoder, ids[:, :4], mask[:, :4], head.view(2, 9)[:, 3], decoder.new_cache(2, 32))
    same(logits, expected[:, 3])
    for at in range(4, 9):
        position = torch.full((2,), at)
        logits, cache = decode(decoder, ids[:, at], mask[:, at], position, head.view(2, 9)[:, at], cache)
        same(logits, expected[:, at])


def test_the_cache_that_goes_in_is_not_changed() -> None:
    decoder = decoder_of(TINY)
    ids, mask = sequence(TINY, 1, 4)
    cache = decoder.new_cache(1, 8)
    _, present = decoder(ids, mask, torch.zeros(1, dtype=torch.int64), torch.tensor([3]), torch.tensor([0]), cache)
    assert all(not one.any() for pair in cache for one in pair)
    assert all(one[:, :, :4].any() for pair in present for one in pair)


@pytest.mark.parametrize("name", ["tiny", "three modalities"])
def test_rows_at_different_positions_equal_each_row_alone(name: str) -> None:
    config = VARIANTS[name]
    decoder = decoder_of(config)
    ids, mask = sequence(config, 3, 10)
    starts = torch.tensor([6, 0, 3])
    columns = starts[:, None] + torch.arange(4)
    alone = [whole(decoder, ids[row : row + 1], mask[row : row + 1])[0] for row in range(3)]
    # Each row's own past; what lies behind it is noise, and must not be seen.
    caches = [whole(decoder, ids[row : row + 1], mask[row : row + 1])[1] for row in range(3)]
    together = [tuple(torch.cat([one[layer][kind] for one in caches]) for kind in (0, 1)) for layer in range(config.num_layers)]
    for pair in together:
        for buffer in pair:
            for row, start in enumerate(starts.tolist()):
                buffer[row, :, start:] = 9.0
    batch = [values.gather(1, columns) for values in (ids, mask)]
    logits, _ = decoder(*batch, starts, torch.arange(12), torch.zeros(12, dtype=torch.int64), together)
    for row in range(3):
        same(logits.view(3, 4, -1)[row], alone[row][columns[row]])


def test_a_wanted_position_and_what_it_predicts_are_free() -> None:
    decoder = decoder_of(TINY)
    ids, mask = sequence(TINY, 2, 5)
    text, audio = (whole(decoder, ids, mask, torch.full((10,), modality))[0] for modality in (0, 1))
    index, head = torch.tensor([9, 0, 0, 4]), torch.tensor([1, 0, 1, 1])
    logits, _ = decoder(ids, mask, torch.zeros(2, dtype=torch.int64), index, head, decoder.new_cache(2, 8))
    same(logits, torch.where(head[:, None] == 0, text[index], audio[index]))


def test_no_wanted_position_gives_no_logits_and_a_written_cache() -> None:
    decoder = decoder_of(TINY)
    ids, mask = sequence(TINY, 1, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    logits, cache = decoder(ids, mask, torch.zeros(1, dtype=torch.int64), nothing, nothing, decoder.new_cache(1, 8))
    assert logits.shape == (0, TINY.vocab_size)
    same(cache[1][0], whole(decoder, ids, mask, capacity=8)[1][1][0])


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if len(config.modalities) > 1])
def test_ids_of_other_modalities_are_never_and_own_ones_always_finite(name: str) -> None:
    config = VARIANTS[name]
    ids, mask = sequence(config, 1, 6)
    for modality, owned in enumerate(config.id_ranges):
        logits, _ = whole(decoder_of(config), ids, mask, torch.full((6,), modality))
        inside = torch.zeros(config.vocab_size, dtype=torch.bool)
        inside[owned.start : owned.stop] = True
        assert logits[:, inside].isfinite().all()
        assert (logits[:, ~inside] == float("-inf")).all()


@pytest.mark.parametrize("name", ["tiny", "shared head", "tied", "three modalities"])
def test_another_head_gives_the_same_logits(name: str) -> None:
    config = VARIANTS[name]
    native = {name: value.double() for name, value in random_tensors(config, 0)}
    ids, mask = sequence(config, 2, 6)
    head = torch.arange(12) % len(config.modalities)
    expected = whole(decoder_of(config), ids, mask, head)[0]
    other_config, read = with_head(config, native.__getitem__, "shared" if config.head == "split" else "split")
    assert other_config.head != config.head
    same(whole(Decoder.from_tensors(other_config, read, torch.float64), ids, mask, head)[0], expected)


def test_one_modality_is_a_plain_llama() -> None:
    """Written out without routing, cache or filter."""
    decoder = decoder_of(ONE)
    weights = dict(state_of(decoder))
    ids, mask = sequence(ONE, 1, 7)
    h, k, d = ONE.num_heads, ONE.num_kv_heads, ONE.head_size

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + ONE.norm_eps).sqrt() * weights[name]

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(7.0, dtype=torch.float64)[:, None] * ONE.rope.theta ** -(torch.arange(0, d, 2).double() / d)
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2)

    x = weights["tok_embeddings.weight"][ids[0]]
    for layer in range(ONE.num_layers):
        at, ff = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward.text."
        a = norm(x, f"layers.{layer}.attention_norm.weight")
        q, key, v = (
            (a @ weights[f"{at}{w}.text.weight"].T).view(7, heads, d).transpose(0, 1)
            for w, heads in (("wq", h), ("wk", k), ("wv", k))
        )
        key, v = (one.repeat_interleave(h // k, 0) for one in (turn(key), v))
        scores = (turn(q) @ key.transpose(1, 2) / d**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(7, h * d) @ weights[f"{at}wo.text.weight"].T
        f = norm(x, f"layers.{layer}.ffn_norm.weight")
        gated = F.silu(f @ weights[f"{ff}w1.weight"].T) * (f @ weights[f"{ff}w3.weight"].T)
        x = x + gated @ weights[f"{ff}w2.weight"].T
    same(whole(decoder, ids, mask)[0], norm(x, "norm.weight") @ weights["output.weight"].T)


def test_a_modality_reads_its_own_experts_alone() -> None:
    """Every other modality's weights are NaN, for each modality in turn."""
    for modality, one in enumerate(THREE.modalities):
        ids = torch.tensor([list(THREE.id_ranges[modality])[:6]])
        mask, head = torch.full_like(ids, modality), torch.full((6,), modality)
        expected = whole(decoder_of(THREE), ids, mask, head)[0]
        poisoned = decoder_of(THREE)
        for parameter in parameters(THREE):
            if parameter.modality not in (None, one.name):
                poisoned.get_parameter(parameter.name).fill_(float("nan"))
        assert torch.equal(whole(poisoned, ids, mask, head)[0], expected)


def test_every_weight_of_a_present_modality_matters() -> None:
    ids, mask = sequence(THREE, 1, 12)
    head = torch.arange(12) % 3
    assert set(mask.flatten().tolist()) == {0, 1, 2}
    expected = whole(decoder_of(THREE), ids, mask, head)[0]
    for parameter in parameters(THREE):
        other = decoder_of(THREE)
        other.get_parameter(parameter.name).mul_(1.5)
        assert not torch.allclose(whole(other, ids, mask, head)[0], expected, rtol=1e-6, atol=1e-6), parameter.name


def test_two_modalities_that_share_every_weight_are_one() -> None:
    """Routing itself changes nothing: the plain model and its twice-stored copy say the same."""
    twin = TINY.replace(
        modalities=(Modality("text", 50, SwigluExpert(128)), Modality("more", 46, SwigluExpert(128))), head="shared"
    )
    plain = ONE.replace(modalities=(Modality("text", 96, SwigluExpert(128)),))
    weights = dict(random_tensors(plain, 3))
    doubled = Decoder.from_tensors(twin, lambda name: weights[name.replace(".more.", ".text.")], torch.float64)
    ids, mask = sequence(twin, 2, 8)
    single = Decoder.from_tensors(plain, weights.__getitem__, torch.float64)
    expected = whole(single, ids, torch.zeros_like(mask))[0]
    head = torch.arange(16) % 2
    came = whole(doubled, ids, mask, head)[0]
    inside = came.isfinite()
    same(came[inside], expected[inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cache_and_logits_have_the_dtypes_of_the_contract(dtype: torch.dtype) -> None:
    decoder = Decoder.from_tensors(TINY, dict(random_tensors(TINY, 0)).__getitem__, dtype)
    ids, mask = sequence(TINY, 1, 3)
    logits, cache = whole(decoder, ids, mask)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {one.dtype for pair in cache for one in pair} == {dtype}


def test_a_decoder_made_at_once_equals_one_read_tensor_by_tensor() -> None:
    weights = dict(random_tensors(TINY, 0))
    made = Decoder(TINY)
    made.load_state_dict(weights)
    ids, mask = sequence(TINY, 1, 6)
    read = Decoder.from_tensors(TINY, weights.__getitem__)
    assert torch.equal(whole(made, ids, mask)[0], whole(read, ids, mask)[0])
    assert [name for name, _ in state_of(read)] == [parameter.name for parameter in parameters(TINY)]


def one_step(config: ModelConfig, policy: Policy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after one step of gradient descent on all parameters that ask for a gradient."""
    decoder = decoder_of(config)
    zeroed = [config.id_ranges[1].start, config.vocab_size]
    with torch.no_grad():
        decoder.tok_embeddings.weight[slice(*zeroed)] = 0
        if config.head == "shared":
            decoder.get_parameter("output.weight")[slice(*zeroed)] = 0
    apply_policy(decoder, config, policy)
    before = {name: value.detach().clone() for name, value in decoder.named_parameters()}
    ids, mask = sequence(config, 2, 8)
    targets = ids.roll(-1, 1).flatten()
    logits = whole(decoder, ids, mask, mask.roll(-1, 1).flatten())[0]
    torch.autograd.backward(F.cross_entropy(logits, targets))
    torch.optim.SGD(trained(decoder.parameters()), lr=0.1).step()
    return before, dict(decoder.named_parameters())


def trained(values: Iterable[Tensor]) -> list[Tensor]:
    return [value for value in values if value.requires_grad]


def test_training_the_adapters_alone_leaves_zero_audio_rows_dead() -> None:
    before, after = one_step(TINY.replace(head="shared"), "adapters")
    audio = TINY.id_ranges[1]
    for table in ("tok_embeddings.weight", "output.weight"):
        assert not after[table][audio.start :].any()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The head's audio rows are zero, so that only text predictions can teach the projections at all.
    assert moved and all("down_proj" in name or "up_proj" in name for name in moved)


def test_training_the_new_rows_moves_them_and_no_other_row() -> None:
    before, after = one_step(TINY.replace(head="shared"), "adapters+new-rows")
    first = TINY.id_ranges[1].start
    assert torch.equal(after["tok_embeddings.weight"][:first], before["tok_embeddings.weight"][:first])
    assert torch.equal(after["output.weight"][:first], before["output.weight"][:first])
    assert (after["output.weight"][first:] != 0).any(1).all()
    assert after["tok_embeddings.weight"][first:].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_that_is_used_gets_a_gradient(name: str) -> None:
    config = VARIANTS[name]
    decoder = decoder_of(config)
    for parameter in decoder.parameters():
        parameter.requires_grad_(True)
    ids, mask = sequence(config, 2, 12)
    logits = whole(decoder, ids, mask, torch.arange(24) % len(config.modalities))[0]
    torch.autograd.backward(logits[logits.isfinite()].square().sum())
    assert [name for name, value in decoder.named_parameters() if value.grad is None or not value.grad.any()] == []

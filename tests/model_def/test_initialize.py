"""Random weights behave: the same for a seed, of order one through many layers, and with nothing that can vanish unseen."""

from pathlib import Path

import pytest
import torch

from motrt.errors import CheckpointError
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import init_checkpoint, random_tensor, random_tensors
from motrt.model_def.parameters import parameters

TINY = ModelConfig.tiny()


def test_every_parameter_comes_once_in_order_and_in_shape() -> None:
    made = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in random_tensors(TINY, 0, "bfloat16")]
    assert made == [(p.name, p.shape, torch.bfloat16) for p in parameters(TINY)]


def test_a_seed_gives_the_same_values_and_another_seed_others() -> None:
    for parameter in parameters(TINY):
        first = random_tensor(TINY, parameter, 3)
        assert torch.equal(first, random_tensor(TINY, parameter, 3))
        assert not torch.equal(first, random_tensor(TINY, parameter, 4))


def test_neither_order_nor_head_nor_dtype_changes_a_tensor() -> None:
    shared = dict(random_tensors(TINY.replace(head="shared"), 3))
    for parameter in reversed(parameters(TINY)):
        tensor = random_tensor(TINY, parameter, 3)
        assert parameter.part == "head" or torch.equal(tensor, shared[parameter.name])
        assert torch.equal(tensor.half(), random_tensor(TINY, parameter, 3, "float16"))


def test_no_two_tensors_of_one_shape_are_equal() -> None:
    tensors = dict(random_tensors(TINY, 0))
    names = list(tensors)
    equal = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if torch.equal(tensors[a], tensors[b])]
    assert equal == []


def test_norms_and_biases_can_be_told_from_absent_ones() -> None:
    for name, tensor in random_tensors(TINY.replace(qk_norm=True), 0):
        if tensor.ndim == 1:
            absent = torch.zeros_like(tensor) if name.endswith("bias") else torch.ones_like(tensor)
            assert 0.02 < (tensor - absent).std() < 0.3, name


_DEEP = TINY.replace(num_layers=24, qk_norm=False)
_DEEP_NORMED = _DEEP.replace(qk_norm=True)
_DEEP_TIED = _DEEP.replace(head="shared", tied_embeddings=True)


@pytest.mark.parametrize("config", [_DEEP, _DEEP_NORMED, _DEEP_TIED], ids=["split", "q/k norm", "tied"])
@pytest.mark.parametrize("modality", [0, 1])
def test_activations_stay_of_order_one_through_many_layers(config: ModelConfig, modality: int) -> None:
    decoder = Decoder.from_tensors(config, dict(random_tensors(config, 0)).__getitem__)
    sizes: list[float] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _module, _args, result: sizes.append(result[0].square().mean().sqrt().item()))
    ids = torch.tensor(list(config.id_ranges[modality])[:24])[None]
    mask = torch.full_like(ids, modality)
    logits, _ = decoder(ids, mask, torch.zeros(1, dtype=torch.int64), torch.arange(24), mask[0], decoder.new_cache(1, 24))
    assert len(sizes) == 24
    assert 0.2 < sizes[-1] < 3 and max(sizes) < 3
    own = logits[:, config.id_ranges[modality].start : config.id_ranges[modality].stop]
    assert 0.5 < own.std() < 6


def test_a_written_checkpoint_holds_the_same_values(tmp_path: Path) -> None:
    done: list[int] = []
    init_checkpoint(tmp_path / "model", TINY, "float16", seed=5, progress=done.append)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert sum(done) == checkpoint.num_bytes
    for name, tensor in random_tensors(TINY, 5, "float16"):
        assert torch.equal(checkpoint.read(name), tensor)


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype must be one of"):
        init_checkpoint(tmp_path / "model", TINY, "int4")

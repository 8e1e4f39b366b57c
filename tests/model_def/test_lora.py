"""A LoRA adapter of PEFT is merged as PEFT defines it, or refused by what it is. Held against PEFT itself: benchmarks/."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from motrt.errors import CheckpointError, MotrtError
from motrt.model_def.checkpoint.assemble import convert_llama
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.foreign import State, write_json, write_llama_hf, write_llama_meta

CONFIG = ModelConfig.tiny()


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 31))


def lora_folder(folder: Path, matrices: State, pickled: bool = False, **changes: Any) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 12,
        "bias": "none",
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    write_json(folder / "adapter_config.json", config | changes)
    if pickled:
        torch.save(matrices, folder / "adapter_model.bin")
    else:
        save_file(matrices, folder / "adapter_model.safetensors")
    return folder


def matrices(seed: int = 0) -> State:
    chance = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 128)}
    found: State = {}
    for layer in range(CONFIG.num_layers):
        for module, (rows, columns) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=chance)
            found[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=chance)
    return found


@pytest.mark.parametrize(("changes", "scale"), [({}, 3.0), ({"use_rslora": True}, 6.0), ({"lora_alpha": 1}, 0.25)])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_lora_adapter_is_merged_as_peft_defines_it(
    tmp_path: Path, native: State, changes: dict[str, Any], scale: float, pickled: bool
) -> None:
    folder, lora = write_llama_hf(tmp_path / "llama", CONFIG, native), matrices()
    assembly = convert_llama(folder, lora=lora_folder(tmp_path / "lora", lora, pickled, **changes))
    assembly.accounting.raise_unless_clean()
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = lora[f"{stem}.lora_A.weight"].double().numpy(), lora[f"{stem}.lora_B.weight"].double().numpy()
    name = "layers.1.feed_forward.text.w2.weight"
    expected = native[name].double().numpy() + scale * (b @ a)
    np.testing.assert_allclose(assembly.read(name).numpy(), expected, rtol=1e-5, atol=1e-5)
    untouched = "layers.1.feed_forward.text.w1.weight"
    assert torch.equal(assembly.read(untouched), native[untouched])
    assert f"lora: LoRA merged into 4 weights, scale {scale:g}" in assembly.accounting.notes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "use_dora must be False"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA'"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"r": 0}, "r must be a positive whole number"),
        ({"lora_alpha": "16"}, "lora_alpha a number"),
        ({"lora_alpha": 10**400}, "lora_alpha a number"),
        ({"r": True}, "r must be a positive whole number"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"r": 2}, "of rank 2, is not"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    tmp_path: Path, native: State, changes: dict[str, Any], sentence: str
) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    with pytest.raises(MotrtError, match=sentence):
        convert_llama(folder, lora=lora_folder(tmp_path / "lora", matrices(), **changes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda state: {name: value for name, value in state.items() if "1.mlp.down_proj.lora_B" not in name},
            "no counterpart",
        ),
        (lambda state: {name.replace("q_proj", "z_proj"): value for name, value in state.items()}, "the base holds no"),
        (lambda state: {name: value[:3] if "lora_A" in name else value for name, value in state.items()}, "is not"),
        (lambda state: state | {"base_model.model.lm_head.weight": torch.ones(96, 64)}, "is no LoRA matrix"),
        (
            lambda state: state | {name.removeprefix("base_model.model."): one.clone() for name, one in state.items()},
            "is added to",
        ),
        (lambda state: {name: value.int() for name, value in state.items()}, "no matrix of floating point"),
        (lambda state: {}, "it holds no matrix"),
    ],
)
def test_a_lora_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, native: State, change: Callable[[State], State], sentence: str
) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    changed = {name: value.contiguous() for name, value in change(matrices()).items()}
    with pytest.raises(CheckpointError, match=sentence):
        convert_llama(folder, lora=lora_folder(tmp_path / "lora", changed))


def test_a_lora_adapter_that_makes_weights_infinite_is_refused(tmp_path: Path, native: State) -> None:
    folder = write_llama_hf(tmp_path / "llama", CONFIG, native)
    huge = {name: value * 1e30 for name, value in matrices().items()}
    with pytest.raises(CheckpointError, match="infinite in"):
        list(convert_llama(folder, lora=lora_folder(tmp_path / "lora", huge)).tensors())


def test_two_lora_files_in_one_folder_are_refused(tmp_path: Path, native: State) -> None:
    lora = lora_folder(tmp_path / "lora", matrices())
    torch.save(matrices(1), lora / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="remove the one that is not meant"):
        convert_llama(write_llama_hf(tmp_path / "llama", CONFIG, native), lora=lora)


def test_a_lora_adapter_over_metas_rows_is_refused(tmp_path: Path, native: State) -> None:
    with pytest.raises(MotrtError, match="Meta's is another"):
        convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), lora=lora_folder(tmp_path / "lora", matrices()))

"""A Mixture-of-Transformers state becomes a native model: every weight in its place, every key accounted for."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.checkpoint.assemble import Assembly, convert_mot, convert_native
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import AdapterExpert, ModelConfig, RopeConfig, SwigluExpert
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.foreign import State, mot_state, params_of, write_json, write_mot

SPLIT = ModelConfig.tiny()
SHARED = SPLIT.replace(head="shared")
TEXT, AUDIO = SPLIT.modalities
TWO_SWIGLU = SPLIT.replace(modalities=(TEXT, type(AUDIO)("audio", 32, SwigluExpert(48), 4, 50.0)))
NO_BIAS = SPLIT.replace(modalities=(TEXT, type(AUDIO)("audio", 32, AdapterExpert(32, 64, bias=False), 4, 50.0)))
TEXT_ONLY = SHARED.replace(modalities=(TEXT,))


def weights(config: ModelConfig) -> State:
    return dict(random_tensors(config, 11))


def converted(folder: Path, config: ModelConfig, state: State, params: dict[str, Any] | None = None) -> Assembly:
    torch.save(state, folder / "state.pt")
    return convert_mot(folder / "state.pt", write_json(folder / "params.json", params or params_of(config)))


def assert_same(assembly: Assembly, config: ModelConfig, native: State) -> None:
    assembly.accounting.raise_unless_clean()
    assert assembly.config == config
    values = dict(assembly.tensors())
    assert list(values) == list(native)
    assert all(torch.equal(values[name], native[name]) for name in native)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        SPLIT,
        SHARED,
        SPLIT.replace(qk_norm=True),
        SHARED.replace(routed_attention=False),
        TWO_SWIGLU,
        NO_BIAS,
        TEXT_ONLY,
        TEXT_ONLY.replace(head="split"),
    ],
    ids=["split", "shared", "q/k norm", "one attention", "two swiglu", "no bias", "text alone", "text alone, split"],
)
def test_a_state_comes_back_as_the_model_it_was_written_from(tmp_path: Path, config: ModelConfig, nested: bool) -> None:
    native = weights(config)
    assert_same(convert_mot(*write_mot(tmp_path, config, native, nested)), config, native)


def test_the_written_checkpoint_holds_the_same_bits(tmp_path: Path) -> None:
    native = weights(SPLIT)
    convert_mot(*write_mot(tmp_path, SPLIT, native)).write(tmp_path / "native", shard_bytes=50_000)
    checkpoint = open_checkpoint(tmp_path / "native")
    assert (checkpoint.config, checkpoint.dtype) == (SPLIT, "float32")
    assert all(torch.equal(checkpoint.read(name), native[name]) for name in native)


def test_every_key_has_a_line_and_unused_norms_say_why(tmp_path: Path) -> None:
    assembly = convert_mot(*write_mot(tmp_path, SPLIT, weights(SPLIT)))
    assert sorted(row.key for row in assembly.accounting.rows) == sorted([*mot_state(SPLIT, weights(SPLIT)), "step"])
    ignored = [row for row in assembly.accounting.rows if row.outcome == "ignored" and row.key != "step"]
    assert len(ignored) == 2 * SPLIT.num_layers * 2
    assert all("_norm." in row.key and "one everywhere" in row.detail for row in ignored)
    told = json.loads(json.dumps(assembly.accounting.to_dict()))
    assert told["clean"] is True
    assert told["counts"] == {"loaded": len(weights(SPLIT)), "ignored": 8 + 1}


@pytest.mark.parametrize(("config", "head"), [(SPLIT, "shared"), (SHARED, "split")])
def test_the_head_can_be_changed_on_the_way(tmp_path: Path, config: ModelConfig, head: Any) -> None:
    native = weights(config)
    state, params = write_mot(tmp_path, config, native)
    assembly = convert_mot(state, params, head=head)
    assert assembly.config == config.replace(head=head)
    read = assembly.read
    if head == "shared":
        whole, pieces = read("output.weight"), (native["output.text.weight"], native["output.audio.weight"])
    else:
        whole, pieces = native["output.weight"], (read("output.text.weight"), read("output.audio.weight"))
    assert torch.equal(whole, torch.cat(pieces))


def test_a_native_checkpoint_can_change_head_and_dtype(tmp_path: Path) -> None:
    native = weights(SPLIT)
    convert_mot(*write_mot(tmp_path, SPLIT, native)).write(tmp_path / "one")
    assembly = convert_native(tmp_path / "one", head="shared", dtype="bfloat16")
    assembly.write(tmp_path / "two")
    two = open_checkpoint(tmp_path / "two")
    assert (two.config, two.dtype) == (SHARED, "bfloat16")
    rows = torch.cat([native["output.text.weight"], native["output.audio.weight"]])
    assert torch.equal(two.read("output.weight"), rows.bfloat16())


def test_sizes_and_rope_come_from_params_json(tmp_path: Path) -> None:
    params = params_of(SPLIT) | {"rope_theta": 10000, "norm_eps": 1e-6, "max_seq_len": None}
    config = converted(tmp_path, SPLIT, mot_state(SPLIT, weights(SPLIT)), params).config
    assert config.rope == RopeConfig(theta=10000.0, style="interleaved", scaling=None)
    assert (config.norm_eps, config.max_seq_len) == (1e-6, 8192)


@pytest.mark.parametrize("sublayer", ["attention.local_experts_attention_norm", "feed_forward.local_experts_ffn_norm"])
@pytest.mark.parametrize("value", [1.0 + 2**-20, 0.0, float("nan")])
def test_a_trained_norm_behind_the_experts_is_refused(tmp_path: Path, sublayer: str, value: float) -> None:
    key = f"layers.1.{sublayer}.1.weight"
    state = mot_state(SPLIT, weights(SPLIT))
    state[key][3] = value
    assembly = converted(tmp_path, SPLIT, state)
    assert [(row.outcome, row.key) for row in assembly.accounting.faults] == [("unexpected", key)]
    with pytest.raises(CheckpointError, match="values other than one"):
        assembly.write(tmp_path / "native")


@pytest.mark.parametrize("value", [torch.ones(0), torch.ones(3, 3), torch.ones(64, dtype=torch.bool), torch.ones(64).int()])
def test_a_norm_behind_the_experts_of_another_kind_is_refused(tmp_path: Path, value: torch.Tensor) -> None:
    key = "layers.0.attention.local_experts_attention_norm.0.weight"
    assembly = converted(tmp_path, SPLIT, mot_state(SPLIT, weights(SPLIT)) | {key: value})
    assert [(row.outcome, row.key) for row in assembly.accounting.faults] == [("unexpected", key)]


@pytest.mark.parametrize(("stated", "is_right"), [(True, False), (False, True)])
def test_norms_of_queries_and_keys_are_as_params_json_says(tmp_path: Path, stated: bool, is_right: bool) -> None:
    state, params = mot_state(SPLIT, weights(SPLIT)), params_of(SPLIT) | {"qk_normalization": stated}
    if is_right:
        assert not converted(tmp_path, SPLIT, state, params).config.qk_norm
    else:
        with pytest.raises(ConfigError, match="norms of queries and keys: the configuration says True, the weights have False"):
            converted(tmp_path, SPLIT, state, params)


def test_a_field_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    params = params_of(SPLIT) | {"n_modalities": 2, "debug_mot": True, "attention_chunk_size": 8, "moe": {"experts": 2}}
    with pytest.raises(ConfigError, match="whether it changes the model cannot be told") as caught:
        converted(tmp_path, SPLIT, mot_state(SPLIT, weights(SPLIT)), params)
    assert "attention_chunk_size (8)" in str(caught.value) and 'moe ({"experts": 2})' in str(caught.value)
    assert "debug_mot" not in str(caught.value) and "n_modalities" not in str(caught.value)


def test_mixed_dtypes_are_widened_and_never_rounded(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in mot_state(SPLIT, weights(SPLIT)).items()}
    assert converted(tmp_path, SPLIT, state).dtype == "bfloat16"
    state["norm.weight"] = state["norm.weight"].half()
    assert converted(tmp_path, SPLIT, state).dtype == "float32"  # neither of the two holds the other


def _remove(state: State) -> None:
    del state["layers.1.attention.local_experts_wo.1.weight"], state["norm.weight"]


def _stray(state: State) -> None:
    state["layers.0.feed_forward.gate.weight"] = torch.zeros(2, 64)
    state["layers.0.feed_forward.local_experts.2.w1.weight"] = torch.zeros(2, 64)


def _transpose(state: State) -> None:
    name = "layers.1.feed_forward.local_experts.1.down_proj.weight"
    state[name] = state[name].T


def _integers(state: State) -> None:
    state["norm.weight"] = torch.ones(64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("fault", "faults"),
    [
        (_remove, {("missing", "layers.1.attention.local_experts_wo.1.weight"), ("missing", "norm.weight")}),
        (
            _stray,
            {
                ("unexpected", "layers.0.feed_forward.gate.weight"),
                ("unexpected", "layers.0.feed_forward.local_experts.2.w1.weight"),
            },
        ),
        (_transpose, {("misshapen", "layers.1.feed_forward.local_experts.1.down_proj.weight")}),
        (_integers, {("misshapen", "norm.weight")}),
    ],
)
def test_keys_that_do_not_fit_are_all_named(
    tmp_path: Path, fault: Callable[[State], None], faults: set[tuple[str, str]]
) -> None:
    state = mot_state(SPLIT, weights(SPLIT))
    fault(state)
    assembly = converted(tmp_path, SPLIT, state)
    assert {(row.outcome, row.key) for row in assembly.accounting.faults} == faults
    with pytest.raises(CheckpointError) as caught:
        assembly.write(tmp_path / "out")
    assert all(f"{outcome}: {key}" in str(caught.value) for outcome, key in faults)
    assert not (tmp_path / "out").exists()


def test_the_width_of_the_feed_forward_is_the_weights_whatever_the_rule_of_thumb_gives(tmp_path: Path) -> None:
    params = params_of(SPLIT) | {"multiple_of": 7, "ffn_dim_multiplier": 1.5}
    assembly = converted(tmp_path, SPLIT, mot_state(SPLIT, weights(SPLIT)), params)
    assert assembly.config.modalities[0].expert == SPLIT.modalities[0].expert


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 32}, "model width: the configuration says 32, the weights have 64"),
        ({"n_layers": 3}, "layers: the configuration says 3, the weights have 2"),
        ({"n_heads": 8, "head_dim": 16}, "heads x head size: the configuration says 128, the weights have 64"),
        ({"n_kv_heads": 1}, "key/value heads x head size: the configuration says 16, the weights have 32"),
        ({"vocab_size": 128}, "which leaves none for audio"),
        ({"n_heads": 3}, "must divide dim"),
        ({"dim": None}, "missing field 'dim'"),
        ({"n_layers": "two"}, "n_layers must be a positive whole number ('two' came)"),
        ({"norm_eps": 0}, "norm_eps must be a positive number"),
        ({"norm_eps": 10**400}, "norm_eps must be a positive number"),
        ({"use_scaled_rope": "false"}, "use_scaled_rope must be true or false ('false' came)"),
        ({"use_scaled_rope": 0}, "use_scaled_rope must be true or false (0 came)"),
        ({"n_kv_heads": 32, "head_dim": 1, "n_heads": 64}, "num_heads"),
    ],
)
def test_params_that_contradict_the_weights_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    state = mot_state(SPLIT, weights(SPLIT))
    with pytest.raises(ConfigError) as caught:
        converted(tmp_path, SPLIT, state, params_of(SPLIT) | changes)
    if sentence != "num_heads":
        assert sentence in str(caught.value)
    assert "params.json" in str(caught.value)


def test_audio_rows_without_an_audio_expert_are_refused(tmp_path: Path) -> None:
    state = mot_state(TEXT_ONLY, weights(TEXT_ONLY))
    state["tok_embeddings.weight"] = torch.zeros(128, 64)
    with pytest.raises(ConfigError, match=r"vocab_size says 96, state\.pt has 128 embedding rows and no audio expert"):
        converted(tmp_path, TEXT_ONLY, state)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text expert"):
        converted(tmp_path, SPLIT, {"conv.weight": torch.zeros(2, 2)})


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must never run",)


def test_pickled_code_is_refused_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": {"norm.weight": torch.ones(2)}, "hook": _Code()}, tmp_path / "state.pt")
    params = write_json(tmp_path / "params.json", params_of(SPLIT))
    with pytest.raises(CheckpointError, match=r"holds pickled code \(\w+\.system\).*save the tensors alone") as caught:
        convert_mot(tmp_path / "state.pt", params)
    assert "\n" not in str(caught.value)
    assert "must never run" not in capfd.readouterr().out


def test_a_pickled_module_is_refused_and_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=re.escape("pickled code (torch.nn.modules.linear.Linear)")):
        convert_mot(tmp_path / "state.pt", write_json(tmp_path / "params.json", params_of(SPLIT)))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a PyTorch file of the zip format"),
        (b"hello", "not a PyTorch file of the zip format"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        convert_mot(tmp_path / "state.pt", write_json(tmp_path / "params.json", params_of(SPLIT)))


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_state_is_refused(tmp_path: Path, share: float) -> None:
    state, params = write_mot(tmp_path, SPLIT, weights(SPLIT))
    content = state.read_bytes()
    state.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        convert_mot(state, params)


def test_missing_files_and_other_contents_are_sentences(tmp_path: Path) -> None:
    params = write_json(tmp_path / "params.json", params_of(SPLIT))
    with pytest.raises(CheckpointError, match="can not be read"):
        convert_mot(tmp_path / "none.pt", params)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"mapping from names to tensors \(list came\)"):
        convert_mot(tmp_path / "list.pt", params)
    torch.save({"step": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds none: is it the right file"):
        convert_mot(tmp_path / "empty.pt", params)
    state, _ = write_mot(tmp_path, SPLIT, weights(SPLIT))
    with pytest.raises(CheckpointError, match=r"gone\.json is missing"):
        convert_mot(state, tmp_path / "gone.json")
    params.write_text("[]")
    with pytest.raises(ConfigError, match="should hold a JSON object"):
        convert_mot(state, params)


def test_tensors_without_values_are_named(tmp_path: Path) -> None:
    state = mot_state(SPLIT, weights(SPLIT))
    for key in ("norm.weight", "layers.1.ffn_norm.weight"):
        state[key] = torch.empty(64, device="meta")
    with pytest.raises(CheckpointError, match=r"meta device and have no values") as caught:
        converted(tmp_path, SPLIT, state)
    assert all(f"- {key}" in str(caught.value) for key in ("norm.weight", "layers.1.ffn_norm.weight"))


@pytest.mark.parametrize("number", ["9" * 5000, "01", "1234567", "\u0661"])
def test_a_layer_of_an_impossible_number_is_unexpected(tmp_path: Path, number: str) -> None:
    key = f"layers.{number}.ffn_norm.weight"
    assembly = converted(tmp_path, SPLIT, mot_state(SPLIT, weights(SPLIT)) | {key: torch.ones(64)})
    assert [(row.outcome, row.key) for row in assembly.accounting.faults] == [("unexpected", key)]


def test_what_was_saved_beside_the_state_is_accounted_for(tmp_path: Path) -> None:
    saved = {"model_state_dict": mot_state(SPLIT, weights(SPLIT)), "step": 7, "optimizer_state_dict": {"lr": 0.1}}
    torch.save(saved, tmp_path / "state.pt")
    assembly = convert_mot(tmp_path / "state.pt", write_json(tmp_path / "params.json", params_of(SPLIT)))
    assembly.accounting.raise_unless_clean()
    beside = {row.key for row in assembly.accounting.rows if row.detail == "beside model_state_dict, no weight of the model"}
    assert beside == {"step", "optimizer_state_dict"}

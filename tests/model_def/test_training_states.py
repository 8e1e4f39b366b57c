"""A training state is read however it was saved: wrapped, nested, beside other things, in a file or a distributed folder.

And whatever cannot be read is refused by what it is: nothing that a pickle names runs, and no byte is taken for another.
"""

import argparse
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from motrt.errors import CheckpointError, ConfigError
from motrt.model_def.checkpoint.assemble import Assembly, convert_llama, convert_mot
from motrt.model_def.checkpoint.sniff import describe_raw, kind_of
from motrt.model_def.config import ModelConfig
from motrt.model_def.initialize import random_tensors
from motrt.tests.model_def.foreign import State, mot_state, params_of, write_adapter, write_json, write_llama_meta

CONFIG = ModelConfig.tiny()


@pytest.fixture(scope="module")
def native() -> State:
    return dict(random_tensors(CONFIG, 8))


@pytest.fixture(scope="module")
def state(native: State) -> State:
    return mot_state(CONFIG, native)


def convert(path: Path) -> Assembly:
    return convert_mot(path, write_json(path.parent / "params.json", params_of(CONFIG)))


def saved(folder: Path, values: Any) -> Path:
    torch.save(values, folder / "state.pt")
    return folder / "state.pt"


def assert_holds(assembly: Assembly, native: State) -> None:
    assembly.accounting.raise_unless_clean()
    values = dict(assembly.tensors())
    assert [name for name in native if not torch.equal(values[name], native[name])] == []


# What wraps a state.


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(".attention.", "._checkpoint_wrapped_module.attention."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("feed_forward.", "feed_forward._fsdp_wrapped_module."),
        lambda name: f"model.{name}",
        lambda name: f"state_dict.model._orig_mod.{name}".removeprefix("state_dict."),
    ],
)
def test_words_that_wrappers_leave_in_names_are_taken_off_and_told(
    tmp_path: Path, native: State, state: State, rename: Callable[[str], str]
) -> None:
    assembly = convert(saved(tmp_path, {rename(name): value for name, value in state.items()}))
    assert_holds(assembly, native)
    assert any("state.pt" in note and "." in note for note in assembly.accounting.notes[1:])


def test_two_names_that_become_one_are_refused(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight and module\.norm\.weight are both norm\.weight"):
        convert(saved(tmp_path, state | {"module.norm.weight": torch.zeros(64)}))


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5"},
        lambda state: {"model_state_dict": {"model": state}, "step": 7},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        lambda state: state | {"optimizer": {"lr": 0.1}},
        lambda state: {"module": state, "optimizer": None, "ds_version": "0.17"},
        lambda state: {"model_state_dict": state, "rng_state": torch.get_rng_state(), "loss": torch.tensor(0.3)},
        lambda state: {"state_dict": state, "model": {"name": "x"}},
    ],
)
def test_a_nested_state_is_found_and_what_lies_beside_it_is_told(
    tmp_path: Path, native: State, state: State, nest: Callable[[State], dict[str, Any]]
) -> None:
    assembly = convert(saved(tmp_path, nest(state)))
    assert_holds(assembly, native)


def test_of_two_states_neither_is_taken(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match="holds state_dict and model: which is meant cannot be told"):
        convert(saved(tmp_path, {"model": state, "state_dict": state}))


def test_data_that_training_saves_beside_its_weights_is_no_code(tmp_path: Path, native: State, state: State) -> None:
    beside = {
        "loss": np.float64(2.5),
        "step": np.int64(7),
        "best": np.float32(1.5),
        "rng": np.random.RandomState(0).get_state(),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("runs")),
    }
    assert_holds(convert(saved(tmp_path, {"model": state, **beside})), native)


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must never run",)


@pytest.mark.parametrize(
    ("wrap", "refused"),
    [
        (lambda code: np.array([code], dtype=object), r"\w+\.system"),
        (lambda code: argparse.Namespace(x=code), r"\w+\.system"),
        (lambda code: {"inside": [code]}, r"\w+\.system"),
    ],
)
def test_code_inside_allowed_data_is_refused(
    tmp_path: Path, state: State, wrap: Callable[[Any], Any], refused: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match=rf"pickled code \({refused}\)"):
        convert(saved(tmp_path, {"model": state, "beside": wrap(_Code())}))
    assert "must never run" not in capfd.readouterr().out


def test_a_state_may_be_a_safetensors_file(tmp_path: Path, native: State, state: State) -> None:
    save_file({f"module.{name}": value.contiguous() for name, value in state.items()}, tmp_path / "state.safetensors")
    assert_holds(convert(tmp_path / "state.safetensors"), native)


def test_an_adapters_names_and_scalars_are_read_alike(tmp_path: Path, native: State, state: State) -> None:
    audio = {f"_orig_mod.{name}": value for name, value in state.items() if ".1." in name.split("local_experts")[-1]}
    audio |= {"_orig_mod.tok_embeddings.weight": native["tok_embeddings.weight"]}
    audio |= {"_orig_mod.audio_output.weight": native["output.audio.weight"]}
    adapter = write_adapter(tmp_path / "adapter.pt", audio)
    torch.save({"adapter_state_dict": audio, "step": np.int64(9), "loss": np.float64(0.5)}, adapter)
    assembly = convert_llama(write_llama_meta(tmp_path / "llama", CONFIG, native), adapter=adapter)
    assert_holds(assembly, native)
    assert "adapter.pt: step 9, loss 0.5" in assembly.accounting.notes


class Pickled:
    """Pickles as what it was told: (callable, arguments) or (callable, arguments, state)."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


OBJECT_TYPE = Pickled(np.dtype, ("O", False, True))
FAR_OBJECTS = (3, "|", None, ("a",), {"a": (OBJECT_TYPE, 1 << 30)}, 8, 1, 1 | 4 | 8)  # an object a gigabyte from each element


@pytest.mark.parametrize(
    "value",
    [
        Pickled(np.ndarray, ((4,), Pickled(np.dtype, ("S8", False, True), FAR_OBJECTS))),
        Pickled(np.ndarray, ((4,), Pickled(np.dtype, ("S8", False, True), (3, "|", None, None, None, -8, 1, 0)))),
        Pickled(np.float64(0).__reduce__()[0], (Pickled(np.dtype, ("f8", False, True)), b"short")),
        Pickled(np.float64(0).__reduce__()[0], (OBJECT_TYPE, b"12345678")),
        Pickled(argparse.Namespace, (), {"__class__": 5, "__setstate__": 6}),
        Pickled(pathlib.PosixPath, (), (None, {"_str": "elsewhere"})),
    ],
)
def test_allowed_data_is_a_stand_in_that_can_be_told_nothing(tmp_path: Path, native: State, state: State, value: Any) -> None:
    """Types of numpy would write wherever a file says; a path's class would be another for the whole process."""
    assert_holds(convert(saved(tmp_path, {"model": state, "beside": value})), native)
    assert str(Path("/home/x")) == "/home/x"


def test_states_are_read_by_several_threads_at_once(tmp_path: Path, native: State, state: State) -> None:
    file = saved(tmp_path, {"model": state, "loss": np.float64(2.5)})
    params = write_json(tmp_path / "params.json", params_of(CONFIG))
    with ThreadPoolExecutor(4) as threads:
        for assembly in threads.map(lambda _: convert_mot(file, params), range(24)):
            assert_holds(assembly, native)


def test_attributes_that_a_file_gives_a_tensor_hide_nothing(tmp_path: Path, native: State, state: State) -> None:
    odd = torch.nn.Parameter(state["norm.weight"].clone())
    odd.numel, odd.resolve_neg, odd.untyped_storage = 3, 4, 5  # type: ignore[assignment, method-assign]
    assert_holds(convert(saved(tmp_path, state | {"norm.weight": odd})), native)


# Distributed checkpoints.


def distributed(folder: Path, values: dict[str, Any]) -> Path:
    with pytest.warns(UserWarning, match="torch.distributed is"):
        save(values, checkpoint_id=folder / "dcp")
    return folder / "dcp"


@pytest.mark.parametrize(
    "nest", [lambda state: state, lambda state: {"model": state, "optimizer": {"exp_avg": torch.ones(2)}, "step": 3}]
)
def test_a_distributed_checkpoint_is_read(
    tmp_path: Path, native: State, state: State, nest: Callable[[State], dict[str, Any]]
) -> None:
    folder = distributed(tmp_path, nest(state))
    assert_holds(convert(folder), native)
    assert kind_of(folder) == "mot"
    assert {one.name.removeprefix("model.") for one in describe_raw(folder)} >= set(state)


def test_code_in_a_distributed_checkpoints_table_is_refused(
    tmp_path: Path, state: State, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = distributed(tmp_path, state)
    (folder / ".metadata").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(CheckpointError, match=r"\.metadata holds pickled code \(\w+\.system\)"):
        convert(folder)
    assert "must never run" not in capfd.readouterr().out


@pytest.mark.parametrize(("name", "sentence"), [("../outside.distcp", "no plain file name"), ("gone.distcp", "is missing")])
def test_a_distributed_checkpoint_reads_no_file_outside_its_folder(
    tmp_path: Path, state: State, name: str, sentence: str
) -> None:
    folder = distributed(tmp_path, state)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=sentence):
        convert(folder)


def test_a_distributed_checkpoints_table_can_change_nothing_here(tmp_path: Path, state: State) -> None:
    folder = distributed(tmp_path, state)
    table = (folder / ".metadata").read_bytes()
    planted = pickle.dumps((None, {"_str": "elsewhere"}), 2)[2:-1]
    for name in (b"cpathlib\nPosixPath\n", b"ctorch.distributed.checkpoint.metadata\nMetadata\n"):
        (folder / ".metadata").write_bytes(b"\x80\x04" + name + planted + b"b0" + table[2:])
        with pytest.raises(CheckpointError, match="cannot be read"):
            convert(folder)
    assert str(Path("/home/x")) == "/home/x" and not hasattr(Metadata, "_str")


def changed_table(folder: Path, change: Callable[[Any], object]) -> None:
    table = pickle.loads((folder / ".metadata").read_bytes())
    change(table)
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def _set(table: Any, **fields: Any) -> None:
    for info in table.storage_data.values():
        info.__dict__.update(fields)


def _tensor_of(table: Any) -> Any:
    return table.state_dict_metadata["tok_embeddings.weight"]


OTHER_PATH = Pickled(pathlib.PosixPath, (), (None, {"_str": "__0_0.distcp", "_parts": ["/", "etc", "passwd"]}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table: _tensor_of(table).chunks.clear(), "do not cover it exactly"),
        (lambda table: _tensor_of(table).chunks.append(_tensor_of(table).chunks[0]), "do not cover it exactly"),
        (lambda table: setattr(_tensor_of(table), "size", torch.Size((10**15, 64))), "cannot be read|more bytes"),
        (lambda table: setattr(_tensor_of(table), "size", (-1, 64)), "cannot be read"),
        (lambda table: setattr(_tensor_of(table), "size", ("128", 64)), "cannot be read"),
        (lambda table: setattr(_tensor_of(table), "size", 8192), "cannot be read"),
        (lambda table: setattr(_tensor_of(table), "properties", None), "cannot be read"),
        (lambda table: setattr(_tensor_of(table).chunks[0], "offsets", torch.Size((1, 0))), "lies outside"),
        (lambda table: setattr(_tensor_of(table).chunks[0], "sizes", torch.Size((8192,))), "has other dims"),
        (lambda table: table.state_dict_metadata.update({5: _tensor_of(table)}), "cannot be read"),
        (lambda table: table.storage_data.clear(), "lies nowhere|more bytes"),
        (lambda table: setattr(table, "storage_data", ["x"]), "cannot be read"),
        (lambda table: _set(table, relative_path=OTHER_PATH), "cannot be read"),
        (lambda table: _set(table, relative_path="x" * 5000), "no plain file name"),
        (lambda table: _set(table, offset="0"), "cannot be read"),
        (lambda table: _set(table, transform_descriptors=["zstd"]), "cannot be read"),
    ],
)
def test_a_distributed_checkpoints_table_that_lies_is_a_sentence(
    tmp_path: Path, state: State, change: Callable[[Any], object], sentence: str
) -> None:
    folder = distributed(tmp_path, state)
    changed_table(folder, change)
    with pytest.raises(CheckpointError, match=sentence):
        convert(folder)


def test_a_damaged_distributed_checkpoint_is_a_sentence(tmp_path: Path, state: State) -> None:
    folder = distributed(tmp_path, state)
    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:5000] + bytes(len(whole) - 5000))
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(convert(folder).tensors())
    data.write_bytes(whole[:5000])
    with pytest.raises(CheckpointError, match="more bytes than all files together"):
        convert(folder)
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        convert(folder)


def test_a_distributed_folder_as_a_llama_says_what_it_is_and_what_to_do(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.distributed\.checkpoint.*dcp_to_torch"):
        convert_llama(distributed(tmp_path, state))


def test_a_folder_that_is_no_checkpoint_is_named_as_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder: expected a file that torch\.save wrote"):
        convert_mot(tmp_path, write_json(tmp_path / "params.json", params_of(CONFIG)))


# Files that are not as torch.save writes them.


def rezipped(
    source: Path, target: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda name, data: data
) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for one in old.infolist():
            new.writestr(one.filename, change(one.filename, old.read(one)))
    return target


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused_and_not_taken_for_weights(tmp_path: Path, state: State, compression: int) -> None:
    with pytest.raises(CheckpointError, match="members are compressed"):
        convert(rezipped(saved(tmp_path, state), tmp_path / "small.pt", compression))


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02}", b"garbage", b"\x80\x02."])
def test_an_empty_or_truncated_pickle_is_a_sentence(tmp_path: Path, state: State, content: bytes) -> None:
    broken = rezipped(
        saved(tmp_path, state),
        tmp_path / "broken.pt",
        zipfile.ZIP_STORED,
        lambda name, data: content if name.endswith("data.pkl") else data,
    )
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        convert(broken)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        (lambda: torch.ones(64).to_sparse(), "sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(1).expand(2**40), "elements share 1 places"),
        (lambda: torch.ones(64)[:1].expand(64), "64 elements share 1 places"),
        (lambda: torch.ones(64).as_strided((8, 8), (1, 1)), "64 elements share 15 places"),
        (lambda: torch.ones(1).as_strided((2**20, 2**20), (0, 0)), "elements share 1 places"),
        (lambda: "a word", "not a tensor (str)"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor", "ignore:TypedStorage"
)
def test_what_is_no_dense_tensor_gives_no_weight(tmp_path: Path, state: State, make: Callable[[], Any], reason: str) -> None:
    assembly = convert(saved(tmp_path, state | {"norm.weight": make(), "extra": make()}))
    rows = {(row.key, row.outcome): row.detail for row in assembly.accounting.rows}
    assert reason in rows["norm.weight", "ignored"] and reason in rows["extra", "ignored"]
    assert ("norm.weight", "missing") in rows


def test_a_tensor_with_the_negative_bit_has_its_own_values(tmp_path: Path, native: State, state: State) -> None:
    negative = torch.complex(torch.zeros(64), -state["norm.weight"]).conj().imag
    assert negative.is_neg()
    assert_holds(convert(saved(tmp_path, state | {"norm.weight": negative})), native)


def test_shards_of_a_distributed_run_are_named_as_such(tmp_path: Path, state: State) -> None:
    class _Shard:
        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return Metadata, ()

    with pytest.raises(CheckpointError, match=r"shards of a distributed run.*get_model_state_dict"):
        convert(saved(tmp_path, state | {"norm.weight": _Shard()}))


def test_flat_parameters_are_named_as_such(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match=r"FSDP's flat parameters \(layers\.0\._flat_param\)"):
        convert(saved(tmp_path, state | {"layers.0._flat_param": torch.ones(4)}))


def test_a_llama_where_a_training_state_is_expected_is_named(tmp_path: Path, native: State) -> None:
    folder = write_llama_meta(tmp_path / "llama", CONFIG, native)
    with pytest.raises(ConfigError, match="it is a Llama: convert its folder with --llama"):
        convert_mot(folder / "consolidated.00.pth", folder / "params.json")

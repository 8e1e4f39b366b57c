"""The weight files of a Hugging Face folder: safetensors or ``pytorch_model.bin``, whole or in shards with an index.

One set of weights is read. Where two lie in the folder and both could be meant, that is an error; a ``.bin`` beside
safetensors, as many published folders have it, is left alone and the report says so.
"""

from dataclasses import replace
from pathlib import Path

from motrt.errors import CheckpointError, raise_all
from motrt.model_def.checkpoint.native import read_index
from motrt.model_def.checkpoint.pickle_file import load_pickle
from motrt.model_def.checkpoint.quantized import refuse_quantized
from motrt.model_def.checkpoint.raw_state import RawState, joined, state_from_mapping, state_from_safetensors, without_wrappers
from motrt.model_def.file_problem import link_problem, named_file_problem

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def open_weights(folder: Path) -> RawState:
    """Open the folder's weights, mapped and not read.

    Raises:
        CheckpointError: when there are none, or they are damaged, quantized, twice there, would run code, or are not as their
            index says.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds no weights: expected {SAFETENSORS} or {PICKLE}, whole or in shards")
    if files[0].suffix == ".safetensors":
        raw = state_from_safetensors(folder.name, files)
    else:
        states = [state_from_mapping(file.name, load_pickle(file), str(file)) for file in files]
        raw = joined(folder.name, states)
    refuse_quantized(raw.tensors, str(folder))
    _refuse_other_than_indexed(folder, files[0].suffix, raw)
    unread = [
        name for name in (PICKLE, f"{PICKLE}.index.json") if files[0].suffix == ".safetensors" and (folder / name).is_file()
    ]
    notes = [f"{folder.name}: {name} was not read, the safetensors beside it were" for name in unread]
    return replace(raw, notes=(*raw.notes, *notes))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights: safetensors before pickles; none where there is neither.

    Raises:
        CheckpointError: when two sets lie there, or an index names a file that is missing, outside the folder, or other than it
            says.
    """
    return _files(folder, SAFETENSORS) or _files(folder, PICKLE)


def _files(folder: Path, single_name: str) -> list[Path]:
    single, index = folder / single_name, folder / f"{single_name}.index.json"
    broken = [f"{file.name} {problem}" for file in (single, index) if (problem := link_problem(file))]
    raise_all(CheckpointError, f"{folder} holds weights that cannot be read; fetch them again:", broken)
    if not index.is_file():
        return [single] if single.is_file() else []
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    if single.is_file() and single_name not in names:
        raise CheckpointError(
            f"{folder} holds {single_name} and {index.name}, which names other files: remove the one that is not meant"
        )
    problems = [problem for name in names if (problem := named_file_problem(folder, name))]
    raise_all(CheckpointError, f"{index} names files that can not be used; fetch the folder again:", problems)
    return [folder / name for name in names]


def _refuse_other_than_indexed(folder: Path, ending: str, raw: RawState) -> None:
    """Raise where the shards hold more or less than their index says: one of them is of another save."""
    index = folder / f"{SAFETENSORS if ending == '.safetensors' else PICKLE}.index.json"
    if not index.is_file():
        return
    named, stored = set(map(without_wrappers, read_index(index))), {*raw.tensors, *raw.others}
    problems = [f"{name} is in the index and in no shard" for name in sorted(named - stored)]
    problems += [f"{name} is in a shard and not in the index" for name in sorted(stored - named)]
    raise_all(CheckpointError, f"{index} and its shards differ; fetch the folder again:", problems)

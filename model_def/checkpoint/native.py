"""The native checkpoint: a folder with ``config.json``, ``model.safetensors`` and, where there is one, ``tokenizer.json``.

Over 4 GB the weights are sharded the way Hugging Face's are: ``model-00001-of-00002.safetensors``... and
``model.safetensors.index.json``. Names and shapes are those of ``motrt.model_def.parameters``, all of one float dtype.
Reading and writing hold one tensor at a time. Any of the files may be a link, to wherever; names that an index gives stay in
the folder. This file knows no foreign format and builds no module.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from motrt.errors import CheckpointError, ConfigError, raise_all
from motrt.model_def.atomic_folder import new_folder
from motrt.model_def.checkpoint.container import (
    TORCH_DTYPES,
    StoredTensor,
    begin_container,
    plan_container,
    read_header,
    read_tensor,
    write_tensor,
)
from motrt.model_def.checkpoint.gguf_file import is_gguf
from motrt.model_def.config import ModelConfig
from motrt.model_def.file_problem import file_problem, folder_problem, named_file_problem
from motrt.model_def.parameters import parameters

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
SHARD_BYTES = 4_000_000_000

_HASH_CHUNK = 4 << 20

Progress = Callable[[int], object]
"""Told how many bytes were done since it was last told."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened native checkpoint: everything is checked, nothing is loaded.

    Attributes:
        path: the folder.
        config: what the weights are a model of.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``; every weight's.
        tokenizer_path: its ``tokenizer.json``, or None.
        stored: where each weight lies.
    """

    path: Path
    config: ModelConfig
    dtype: str
    tokenizer_path: Path | None
    stored: Mapping[str, StoredTensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The weights' names, in the order of the forward pass."""
        return tuple(parameter.name for parameter in parameters(self.config))

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights together."""
        return sum(stored.numbytes for stored in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """The dims of one weight.

        Raises:
            CheckpointError: when there is none of that name.
        """
        return self._of(name).shape

    def read(self, name: str) -> torch.Tensor:
        """One weight, in memory of its own: when it is dropped, nothing of the file stays resident.

        Raises:
            CheckpointError: when there is none of that name, or the file changed since it was opened.
        """
        return read_tensor(self._of(name))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every (name, weight) in the order of the forward pass, read as it is asked for."""
        for name in self.names:
            yield name, self.read(name)

    def files(self) -> list[Path]:
        """Every file that belongs to the checkpoint, sorted by name; the tokenizer among them, where there is one."""
        tokenizer = self.path / TOKENIZER_FILE
        return sorted([*self.model_files(), *([tokenizer] if tokenizer.is_file() else [])])

    def model_files(self) -> list[Path]:
        """The files that the model is made of, sorted by name: configuration, weights, and their index where there is one."""
        weights = {stored.file for stored in self.stored.values()}
        others = (self.path / name for name in (CONFIG_FILE, INDEX_FILE))
        return sorted(weights | {path for path in others if path.is_file()})

    def sha256(self, progress: Progress | None = None) -> str:
        """One hash over the names, sizes and contents of ``model_files()``: the checkpoint's identity.

        The tokenizer is no part of it: the model is the same with another beside it, or with none.

        Args:
            progress: told the bytes of each piece when it is hashed.
        """
        digest = hashlib.sha256()
        for file in self.model_files():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb", buffering=0) as stream:
                while chunk := stream.read(_HASH_CHUNK):
                    digest.update(chunk)
                    if progress:
                        progress(len(chunk))
        return digest.hexdigest()

    def _of(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise CheckpointError(f"{self.path} holds no weight {name!r}: its names are those of parameters(config)")
        return self.stored[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a native checkpoint and check all of it but the values.

    Args:
        path: the folder.

    Raises:
        CheckpointError: naming at once every file that is missing, damaged or named outside the folder and every weight that
            is missing, unexpected, misshapen or of another dtype.
        ConfigError: when ``config.json`` describes no possible model.
    """
    folder = Path(path)
    config = _read_config(folder)
    files, index, problems = _weight_files(folder)
    stored, found = _read_headers(files)
    problems += found
    if not problems:
        problems = _index_problems(index, stored) if index is not None else []
        problems += _weight_problems(config, {name: tensors[0] for name, tensors in stored.items()})
    tokenizer = folder / TOKENIZER_FILE
    if os.path.lexists(tokenizer):
        problems += _why_no_file(tokenizer)
    raise_all(
        CheckpointError,
        f"{folder} is not a whole native checkpoint; make it again with `motrt convert` or `motrt init`:",
        problems,
    )
    weights = {name: tensors[0] for name, tensors in stored.items()}
    dtype = next(iter(weights.values())).dtype
    return Checkpoint(folder, config, dtype, tokenizer if tokenizer.is_file() else None, weights)


def write_checkpoint(
    out: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a native checkpoint, one tensor at a time, whole or not at all.

    Args:
        out: the folder to make; it must not exist.
        config: what the weights are a model of.
        tensors: every (name, weight) of ``parameters(config)``, each once, in any order; cast to ``dtype`` as it comes.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``.
        tokenizer: a ``tokenizer.json`` to lay beside the weights.
        shard_bytes: weights that take more bytes than this are written in several files.
        progress: told the bytes of each weight when it is written.
        texts: further files to lay beside the weights: name -> text.

    Raises:
        CheckpointError: ``out`` exists or can not be written, the disk is full, or the tensors are not exactly those of
            ``config`` (all named at once), or a finite value is too large for ``dtype``. Nothing is left behind.
    """
    out = Path(out)
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(TORCH_DTYPES)} ({dtype!r} came)")
    if tokenizer is not None and not tokenizer.is_file():
        raise CheckpointError(f"no tokenizer at {tokenizer}: give the path of a tokenizer.json, or none")
    shapes = {parameter.name: parameter.shape for parameter in parameters(config)}
    needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * TORCH_DTYPES[dtype].itemsize
    with new_folder(out, needed + 200 * len(shapes), CheckpointError) as folder:
        slots = _begin_weights(folder, shapes, dtype, shard_bytes)
        problems = _write_all(slots, tensors, progress)
        raise_all(CheckpointError, f"these tensors are not the model that {out} was to hold:", problems)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def shard_names(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """``shapes`` cut, in order, into groups of at most ``shard_bytes``; a tensor larger than that stands alone."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * item_bytes
        if size > room and groups[-1]:
            groups.append({})
            room = shard_bytes
        groups[-1][name] = shape
        room -= size
    return groups


def _begin_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int
) -> dict[str, StoredTensor]:
    """Every weight file with its header and room for its tensors, and the index where there are several."""
    groups = shard_names(shapes, TORCH_DTYPES[dtype].itemsize, shard_bytes)
    count = len(groups)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    slots: dict[str, StoredTensor] = {}
    for name, group in zip(names, groups, strict=True):
        opening, planned = plan_container(folder / name, group, dtype)
        begin_container(folder / name, opening, planned.values())
        slots.update(planned)
    if count > 1:
        total = sum(slot.numbytes for slot in slots.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: slot.file.name for name, slot in slots.items()}}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return slots


def _write_all(
    slots: Mapping[str, StoredTensor], tensors: Iterable[tuple[str, torch.Tensor]], progress: Progress | None
) -> list[str]:
    problems: list[str] = []
    seen: set[str] = set()
    for name, tensor in tensors:
        problem = _write_one(slots.get(name), name, tensor, seen)
        if problem:
            problems.append(problem)
        elif progress:
            progress(slots[name].numbytes)
        seen.add(name)
    return problems + [f"missing: {name}" for name in slots if name not in seen]


def _write_one(slot: StoredTensor | None, name: str, tensor: torch.Tensor, seen: set[str]) -> str | None:
    """Write one tensor, or say why not."""
    if slot is None:
        return f"unexpected: {name}"
    if name in seen:
        return f"given twice: {name}"
    if tuple(tensor.shape) != slot.shape:
        return f"misshapen: {name} is {list(tensor.shape)}, {list(slot.shape)} was expected"
    if not tensor.is_floating_point():
        return f"not a float: {name} is {tensor.dtype}"
    cast = tensor.detach().to("cpu", TORCH_DTYPES[slot.dtype])
    if cast.dtype != tensor.dtype and not _still_finite(tensor, cast):
        return f"too large for {slot.dtype}: {name} holds finite values that become infinite; choose bfloat16 or float32"
    write_tensor(slot, cast)
    return None


def _still_finite(tensor: torch.Tensor, cast: torch.Tensor) -> bool:
    return bool(cast.isfinite().all()) or int(cast.isfinite().sum()) == int(tensor.isfinite().sum())


def _read_config(folder: Path) -> ModelConfig:
    if is_gguf(folder):
        raise CheckpointError(f"{folder} is a GGUF file: `motrt convert OUT --gguf {folder}` makes a native checkpoint of it")
    if problem := folder_problem(folder):
        raise CheckpointError(
            f"{folder} {problem}: a native checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "other formats become one with `motrt convert`"
        )
    file = folder / CONFIG_FILE
    if not os.path.lexists(file):
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}, so it is not a native checkpoint: other formats become one with `motrt convert`"
        )
    if problem := file_problem(file):
        raise CheckpointError(f"{file} {problem}: fetch or write the checkpoint again")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise ConfigError(
            f"{file} is not readable JSON ({failure}): write it again with `motrt convert` or `motrt init`"
        ) from None
    if isinstance(values, dict) and ("model_type" in values or "architectures" in values):
        raise CheckpointError(f"{folder} is a Hugging Face folder, not a native checkpoint: `motrt convert` makes one of it")
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as failure:
        raise ConfigError(f"{file}: {failure}") from None


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None, list[str]]:
    """The weight files that exist, the index's weight map, and what is wrong with either."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if os.path.lexists(single) and os.path.lexists(index):
        return [], None, [f"both {WEIGHTS_FILE} and {INDEX_FILE} are there: remove the one that is not meant"]
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            return [], None, [f"neither {WEIGHTS_FILE} nor {INDEX_FILE} is there"]
        problems = _why_no_file(single)
        return ([] if problems else [single]), None, problems
    if problems := _why_no_file(index):
        return [], None, problems
    weight_map = read_index(index)
    files: list[Path] = []
    for name in sorted(set(weight_map.values())):
        if problem := named_file_problem(folder, name):
            problems.append(problem)
        else:
            files.append(folder / name)
    return files, weight_map, problems


def read_index(index: Path) -> dict[str, str]:
    """The weight map (tensor name -> file name) of a ``*.safetensors.index.json``.

    Raises:
        CheckpointError: when it is not one.
    """
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise CheckpointError(f"{index} is not readable JSON ({failure}): fetch or write the checkpoint again") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to file names: fetch or write the checkpoint again")
    return weight_map


def _why_no_file(file: Path) -> list[str]:
    problem = file_problem(file)
    return [f"{file.name} {problem}"] if problem else []


def _read_headers(files: Iterable[Path]) -> tuple[dict[str, list[StoredTensor]], list[str]]:
    stored: dict[str, list[StoredTensor]] = {}
    problems: list[str] = []
    for file in files:
        found, problem = _header_or_problem(file)
        problems += problem
        for name, tensor in found.items():
            stored.setdefault(name, []).append(tensor)
    return stored, problems


def _header_or_problem(file: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    try:
        return read_header(file), []
    except CheckpointError as failure:
        return {}, [str(failure)]


def _index_problems(index: Mapping[str, str], stored: Mapping[str, list[StoredTensor]]) -> list[str]:
    """Where the index and the files disagree about which tensor is in which file."""
    problems = [f"{name} is not in {file}, where {INDEX_FILE} puts it" for name, file in index.items() if name not in stored]
    for name, tensors in stored.items():
        files = [tensor.file.name for tensor in tensors]
        if name not in index:
            problems.append(f"{name} is in {files[0]} and not in {INDEX_FILE}")
        elif files != [index[name]]:
            problems.append(f"{name} is in {', '.join(files)}, and {INDEX_FILE} puts it in {index[name]}")
    return problems


def _weight_problems(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> list[str]:
    expected = {parameter.name: parameter.shape for parameter in parameters(config)}
    problems = [f"missing: {name}" for name in expected if name not in stored]
    problems += [f"unexpected: {name} {list(stored[name].shape)}" for name in stored if name not in expected]
    problems += [
        f"misshapen: {name} is {list(stored[name].shape)}, {CONFIG_FILE} asks for {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [f"not a float: {name} is {one.dtype}" for name, one in stored.items() if one.dtype not in TORCH_DTYPES]
    dtypes = sorted({one.dtype for one in stored.values()})
    if len(dtypes) > 1:
        problems.append(f"mixed dtypes: one was expected, {', '.join(dtypes)} came")
    return problems

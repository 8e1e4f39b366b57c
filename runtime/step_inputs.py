"""The five small inputs of one pass through the graph, how they are made of prompts and tokens, and their check.

See ``model_def.signature`` for what each means. Everything here is numpy int64; nothing here knows a backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as brief

import numpy as np
from numpy.typing import NDArray

from motrt.errors import CapacityError, InputError, raise_all
from motrt.model_def import signature as names
from motrt.model_def.config import ModelConfig

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class StepInputs:
    """One pass: b rows of s new tokens, n wanted logits.

    Attributes:
        input_ids: [b, s] unified ids.
        modality_mask: [b, s] modality of the token at each position.
        cache_position: [b] tokens already in the cache.
        logits_index: [n] flat positions (row * s + column) whose logits are wanted.
        head_mask: [n] modality predicted at each wanted position.
    """

    input_ids: Int64
    modality_mask: Int64
    cache_position: Int64
    logits_index: Int64
    head_mask: Int64

    def named(self) -> dict[str, Int64]:
        """By the contract's names."""
        return {
            names.INPUT_IDS: self.input_ids,
            names.MODALITY_MASK: self.modality_mask,
            names.CACHE_POSITION: self.cache_position,
            names.LOGITS_INDEX: self.logits_index,
            names.HEAD_MASK: self.head_mask,
        }


def modality_of_ids(ids: Int64, config: ModelConfig) -> Int64:
    """The modality that owns each id. Shape as ``ids``; ids must be in the vocabulary."""
    ends = np.array([owned.stop for owned in config.id_ranges], dtype=np.int64)
    return np.searchsorted(ends, ids, side="right").astype(np.int64)


def check_inputs(inputs: StepInputs, config: ModelConfig, batch_size: int, capacity: int) -> None:
    """Refuse inputs that the graph would answer with nonsense.

    Raises:
        InputError: naming all of: wrong dtypes or shapes, ids or masks out of range, a mask that contradicts the ids.
        CapacityError: when a row would be written past ``capacity``.
    """
    problems = [
        f"{name} must be an int64 array ({getattr(value, 'dtype', type(value).__name__)} came)"
        for name, value in inputs.named().items()
        if not isinstance(value, np.ndarray) or value.dtype != np.int64
    ]
    raise_all(InputError, "inputs of the wrong type:", problems)
    raise_all(InputError, "inputs of the wrong shape:", _shape_problems(inputs, batch_size))
    raise_all(InputError, "inputs out of range:", _range_problems(inputs, config))
    last = int(inputs.cache_position.max(initial=0)) + inputs.input_ids.shape[1]
    if last > capacity:
        raise CapacityError(f"this step writes up to position {last}, and the cache has room for {capacity}: grow it first")


def _shape_problems(inputs: StepInputs, batch_size: int) -> list[str]:
    problems = []
    if inputs.input_ids.ndim != 2 or 0 in inputs.input_ids.shape:
        problems.append(f"input_ids must be [b, s] with at least one token ({list(inputs.input_ids.shape)} came)")
    elif inputs.input_ids.shape[0] != batch_size:
        problems.append(f"input_ids has {inputs.input_ids.shape[0]} rows and the cache {batch_size}")
    if inputs.modality_mask.shape != inputs.input_ids.shape:
        problems.append(
            f"modality_mask must be shaped as input_ids {list(inputs.input_ids.shape)} "
            f"({list(inputs.modality_mask.shape)} came)"
        )
    if inputs.cache_position.shape != (batch_size,):
        problems.append(f"cache_position must be [{batch_size}] ({list(inputs.cache_position.shape)} came)")
    if inputs.logits_index.ndim != 1 or inputs.head_mask.shape != inputs.logits_index.shape:
        problems.append(
            "logits_index and head_mask must be [n] alike "
            f"({list(inputs.logits_index.shape)} and {list(inputs.head_mask.shape)} came)"
        )
    return problems


def _range_problems(inputs: StepInputs, config: ModelConfig) -> list[str]:
    num_modalities = len(config.modalities)
    problems = [
        _out_of_range(name, value, limit)
        for name, value, limit in (
            (names.INPUT_IDS, inputs.input_ids, config.vocab_size),
            (names.MODALITY_MASK, inputs.modality_mask, num_modalities),
            (names.CACHE_POSITION, inputs.cache_position, config.max_seq_len),
            (names.LOGITS_INDEX, inputs.logits_index, inputs.input_ids.size),
            (names.HEAD_MASK, inputs.head_mask, num_modalities),
        )
        if value.size and not (value.min() >= 0 and value.max() < limit)
    ]
    if not problems:
        owners = modality_of_ids(inputs.input_ids, config)
        wrong = np.argwhere(owners != inputs.modality_mask)
        if len(wrong):
            row, column = wrong[0]
            owner, marked = (config.modality_names[mask[row, column]] for mask in (owners, inputs.modality_mask))
            problems.append(
                f"modality_mask contradicts input_ids at {len(wrong)} positions: row {row}, column {column} holds id "
                f"{inputs.input_ids[row, column]}, which is {owner}, and is marked {marked}"
            )
    return problems


def _out_of_range(name: str, value: Int64, limit: int) -> str:
    wrong = value[(value < 0) | (value >= limit)]
    return f"{name} must be in 0..{limit - 1} ({wrong.flat[0]} came, {wrong.size} such)"


def as_whole_numbers(values: object) -> Int64 | None:
    """``values`` as a flat int64 array; None where they are anything but whole numbers, one after the other."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):  # ragged, or of no kind that numpy knows
        return None
    if array.ndim != 1:
        return None
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    is_whole = array.dtype.kind in "iu" and array.max() <= np.iinfo(np.int64).max
    return array.astype(np.int64) if is_whole else None


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig) -> list[Int64]:
    """Prompts as arrays of ids.

    Raises:
        InputError: for no prompt at all, an empty one, values that are no whole numbers, or ids out of range.
    """
    if not isinstance(prompts, Sequence | np.ndarray) or getattr(prompts, "ndim", 1) == 0 or len(prompts) == 0:
        raise InputError(f"no prompt: give at least one sequence of ids ({brief(prompts)} came)")
    rows, problems = [], []
    for number, prompt in enumerate(prompts):
        row = as_whole_numbers(prompt)
        if row is None:
            problems.append(f"prompt {number} must be a flat sequence of whole numbers ({brief(prompt)} came)")
            continue
        if row.size == 0:
            problems.append(f"prompt {number} is empty: give at least one id (a beginning-of-text id, say)")
        elif row.min() < 0 or row.max() >= config.vocab_size:
            problems.append(f"prompt {number}: " + _out_of_range("ids", row, config.vocab_size))
        rows.append(row)
    raise_all(InputError, "prompts that can not be read:", problems)
    return rows


def prefill_inputs(prompts: Sequence[Int64], start: int, stop: int, next_modality: Int64, config: ModelConfig) -> StepInputs:
    """Columns ``start`` to ``stop`` of ragged prompts, logits wanted where a prompt ends within them.

    A row that ends sooner is padded with its own last id: so no other modality's weights are read for its sake. What
    padding writes into the cache stands behind the row's length, unseen until real tokens overwrite it.

    Args:
        prompts: per row its ids.
        start: first column of this chunk.
        stop: the column behind it, at most the longest prompt's length.
        next_modality: [b] predicted behind each prompt's end.
        config: the model's.
    """
    width = stop - start
    ids = np.stack([_window(prompt, start, stop) for prompt in prompts])
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    ending = np.flatnonzero((lengths > start) & (lengths <= stop))
    return StepInputs(
        input_ids=ids,
        modality_mask=modality_of_ids(ids, config),
        cache_position=np.minimum(lengths, start),
        logits_index=ending * width + lengths[ending] - 1 - start,
        head_mask=next_modality[ending],
    )


def _window(prompt: Int64, start: int, stop: int) -> Int64:
    part = prompt[start:stop]
    return np.concatenate([part, np.full(stop - start - len(part), prompt[-1], dtype=np.int64)])


def decode_inputs(
    token_ids: Int64, lengths: Int64, active: Int64, next_modality: Int64, capacity: int, config: ModelConfig
) -> StepInputs:
    """One token per row, logits wanted for the ``active`` rows.

    A row that rests is fed an active row's id, so that no other modality's weights are read for its sake, and is written
    behind what it holds, where nothing looks and its next real token will stand. (A row that holds the model's maximum has
    no such place, and needs none: it can not go on.)

    Args:
        token_ids: [b] each row's newest id; of rows that rest, any.
        lengths: [b] tokens that each row holds.
        active: [n] row numbers that go on.
        next_modality: [n] predicted behind each active row's token.
        capacity: positions that the cache has room for.
        config: the model's.
    """
    ids = np.full((len(lengths), 1), token_ids[active[0]], dtype=np.int64)
    ids[active, 0] = token_ids[active]
    return StepInputs(ids, modality_of_ids(ids, config), np.minimum(lengths, capacity - 1), active, next_modality)

"""What every backend gives: the routed decoder as a session that reads prompts and yields tokens.

A session holds weights and no state of any conversation: caches are made by it, handed in and handed back. It knows
token ids; text comes in only through the tokenizer that a bundle may carry (``decoding``).
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from motrt.errors import BackendError, InputError
from motrt.model_def.config import ModelConfig
from motrt.runtime.kv_cache import SMALLEST_CAPACITY, KVCache, capacity_for
from motrt.runtime.sampling import SamplingByModality
from motrt.runtime.schedule import Schedule
from motrt.runtime.step_inputs import (
    StepInputs,
    as_whole_numbers,
    check_inputs,
    check_prompts,
    decode_inputs,
    modality_of_ids,
    prefill_inputs,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from motrt.runtime.decoding import Prompt, Step

# New tokens per row and pass: bounds the attention mask and the activations of a long prompt.
PREFILL_CHUNK = 512

Logits = NDArray[np.float32]
SessionType = TypeVar("SessionType", bound="Session")


class Session(ABC):
    """A loaded model. Use as a context manager, or call ``close``.

    Threads may share a session, as long as each has its own cache: a pass changes nothing but the cache it is given.
    Once closed, every call is a ``BackendError``; so it is in a process that was forked off the one that opened the session,
    where its threads are not.

    Attributes:
        config: what the model is.
        backend: what runs it, for people: ``onnxruntime (CPU)``.
        precision: of activations and cache: ``fp32``, ``fp16``, ``bf16``, ``fp64``.
        activation_block: activations that share one scale where products round them to 8 bits; None: no product does.
        weights: what the weights are stored as, for people: ``int4``, or the precision again.
        tokenizer: turns text into ids and back; None where the bundle carries none.
        told_of_doubled_start: whether it was said that a prompt's text brings a start token that the tokenizer adds, too.
        smallest_capacity: positions of the smallest cache; the model's maximum where its graphs know no other.
        most_rows: of a batch; None: as many as memory holds.
        longest_pass: new tokens per row that one pass of ``prefill`` takes, where nothing else is said.
    """

    config: ModelConfig
    backend: str
    precision: str
    tokenizer: "Tokenizer | None" = None
    smallest_capacity = SMALLEST_CAPACITY
    longest_pass = PREFILL_CHUNK
    most_rows: int | None = None
    activation_block: int | None = None
    weights: str | None = None
    told_of_doubled_start = False
    _gate: threading.Condition
    _inside: list[int]
    _process: int

    # What a backend writes: four small methods.

    @abstractmethod
    def make_buffers(self, batch_size: int, capacity: int) -> Any:
        """Zeroed keys and values of every layer, [b, k, t, d], in the backend's own form."""

    @abstractmethod
    def grow_buffers(self, buffers: Any, capacity: int) -> Any:
        """The same contents with room for ``capacity`` positions."""

    @abstractmethod
    def execute(self, inputs: StepInputs, cache: KVCache) -> Logits:
        """One pass through the graph, unchecked; the cache's buffers then hold the new keys and values.

        Returns logits [n, v]: float32 (float64 from a float64 reference), memory of the caller's own.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of weights and memory. Called once."""

    def join_buffers(self, rows: Sequence[tuple[Any, int]], capacity: int) -> Any:
        """Copies of rows of other buffers, in the order named, with room for ``capacity`` positions.

        Args:
            rows: buffers of this session's, and the number of a row in them.
            capacity: at least what each of the rows holds.

        Raises:
            BackendError: where the backend's memory can not be copied so.
        """
        raise BackendError(f"{self.backend} can not put rows of several caches into one: serve the bundle with onnxruntime")

    def replace_buffers(self, buffers: Any, rows: Mapping[int, tuple[Any, int]], batch_size: int, capacity: int) -> Any:
        """The same buffers, some of their rows replaced by copies of others' rows; in place where a backend can.

        Args:
            buffers: of this session's.
            rows: by the number of the row that goes, buffers and the number of the row in them that comes.
            batch_size: rows of ``buffers``.
            capacity: positions of ``buffers``.
        """
        return self.join_buffers([rows.get(row, (buffers, row)) for row in range(batch_size)], capacity)

    # What every session does with them.

    _is_closed = False

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        """Give each session what ``close`` needs, whether or not a backend's ``__init__`` calls this class's."""
        made = super().__new__(cls)
        made._gate, made._inside, made._process = threading.Condition(), [], os.getpid()
        return made

    def close(self) -> None:
        """Let go of weights and memory; the session is unusable afterwards. Closing twice is closing once.

        Whoever is in the middle of a pass ends it first, and has a BackendError at the next. In a forked process nothing is let
        go of: it is the other's.
        """
        if self._process != os.getpid():
            self._is_closed = True
            return
        caller = threading.get_ident()
        with self._gate:
            if self._is_closed:
                return
            self._is_closed = True
            self._gate.wait_for(lambda: all(one == caller for one in self._inside))
        self.release()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keep what a backend holds until the block has ended; raises as ``refuse_closed``."""
        self._refuse_another_process()
        with self._gate:
            self.refuse_closed()
            self._inside.append(threading.get_ident())
        try:
            yield
        finally:
            with self._gate:
                self._inside.remove(threading.get_ident())
                self._gate.notify_all()

    def __enter__(self: SessionType) -> SessionType:
        self.refuse_closed()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def new_cache(self, batch_size: int, num_positions: int = 1) -> KVCache:
        """An empty cache of ``batch_size`` rows with room for at least ``num_positions`` each.

        Raises:
            InputError: for a batch of no rows.
            CapacityError: for more positions than the model holds.
        """
        self.refuse_closed()
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InputError(f"a batch needs a whole number of rows, at least one ({batch_size!r} came)")
        capacity = capacity_for(num_positions, self.config.max_seq_len, self.smallest_capacity)
        with self._in_use():
            return KVCache(np.zeros(batch_size, dtype=np.int64), capacity, self.make_buffers(batch_size, capacity), self)

    def reserve(self, cache: KVCache, num_positions: int) -> None:
        """Make room in every row for ``num_positions``, by buckets; what the cache holds stays.

        Raises:
            CapacityError: for more than the model's maximum; the cache is then as it was.
        """
        self.refuse_closed()
        if num_positions > cache.capacity:
            capacity = capacity_for(num_positions, self.config.max_seq_len, self.smallest_capacity)
            with self._in_use():
                cache.buffers = self.grow_buffers(cache.buffers, capacity)
            cache.capacity = capacity

    def join_rows(self, rows: Sequence[tuple[KVCache, int]]) -> KVCache:
        """One cache of copies of rows of others: how requests join a batch that is running, and leave it.

        Args:
            rows: a cache of this session's and the number of a row in it, in the order of the new cache's rows.

        Raises:
            InputError: for no rows, foreign caches, or rows that a cache does not have.
            BackendError: where the backend can not.
        """
        self.refuse_closed()
        if not rows:
            raise InputError("a cache needs at least one row")
        self._refuse_wrong_rows(rows)
        capacity = self.capacity_of(rows)
        lengths = np.array([cache.lengths[row] for cache, row in rows], dtype=np.int64)
        with self._in_use():
            return KVCache(lengths, capacity, self.join_buffers([(cache.buffers, row) for cache, row in rows], capacity), self)

    def replace_rows(self, cache: KVCache, rows: Mapping[int, tuple[KVCache, int]]) -> None:
        """Put copies of others' rows in the places of rows of ``cache``: how requests take the places of those that ended.

        Args:
            cache: of this session's; grown where a row that comes holds more.
            rows: by the number of the row that goes, a cache and the number of the row in it that comes.

        Raises:
            InputError: for foreign caches, rows that a cache does not have, or rows of ``cache`` itself, which may be gone when
                their turn comes; before anything is changed.
            BackendError: where the backend can not.
        """
        self.refuse_closed()
        self._refuse_wrong_rows([*((cache, row) for row in rows), *rows.values()])
        if any(other is cache for other, _ in rows.values()):
            raise InputError(
                "rows come from other caches, not from the one that they go to: join_rows puts rows in another order"
            )
        if not rows:
            return
        self.reserve(cache, max(int(other.lengths[row]) for other, row in rows.values()))
        coming = {place: (other.buffers, row) for place, (other, row) in rows.items()}
        with self._in_use():
            cache.buffers = self.replace_buffers(cache.buffers, coming, cache.batch_size, cache.capacity)
        cache.lengths[list(rows)] = [other.lengths[row] for other, row in rows.values()]

    def capacity_of(self, rows: Sequence[tuple[KVCache, int]]) -> int:
        """The bucket that a cache of those rows has, with room for a token behind the longest. Smaller where few are left."""
        longest = max(int(cache.lengths[row]) for cache, row in rows)
        return capacity_for(min(longest + 1, self.config.max_seq_len), self.config.max_seq_len, self.smallest_capacity)

    def _refuse_wrong_rows(self, rows: Sequence[tuple[KVCache, int]]) -> None:
        for cache, row in rows:
            self._refuse_foreign(cache)
            if not 0 <= row < cache.batch_size:
                raise InputError(f"the cache has rows 0..{cache.batch_size - 1} ({row} came)")

    def run(self, inputs: StepInputs, cache: KVCache) -> Logits:
        """One checked pass of the graph contract.

        ``cache.lengths`` stays as it is: what was written counts once the caller says so.

        Returns:
            Logits [n, v], -inf outside each predicted modality's range.

        Raises:
            InputError: see ``check_inputs``.
            CapacityError: when a row would be written past the cache's capacity.
        """
        self.refuse_closed()
        self._refuse_foreign(cache)
        check_inputs(inputs, self.config, cache.batch_size, cache.capacity)
        with self._in_use():
            return self.execute(inputs, cache)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        next_modality: str | Sequence[str],
        *,
        modality_mask: Sequence[Sequence[int]] | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Logits, KVCache]:
        """Read prompts, of different lengths and modalities if need be, into a new cache.

        Args:
            prompts: per row at least one id.
            next_modality: the modality predicted behind the prompts' ends: one name for all rows, or one per row.
            modality_mask: per row the modality of each id, for callers who keep one: it must agree with the ids, which
                say it by themselves.
            chunk_size: most new tokens per row in one pass; None: as many as the backend likes.

        Returns:
            Logits [b, v] at each prompt's end, and the cache.

        Raises:
            InputError: for empty prompts, ids or masks out of range, or a mask that contradicts the ids.
            CapacityError: for prompts longer than the model's maximum; before anything is computed.
        """
        self.refuse_closed()
        rows = check_prompts(prompts, self.config)
        if modality_mask is not None:
            self._check_mask(rows, modality_mask)
        chunk_size = self.longest_pass if chunk_size is None else chunk_size
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise InputError(f"chunk_size must be a whole number of at least 1 ({chunk_size!r} came)")
        predicted = self._modality_indices(next_modality, len(rows))
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        longest = int(lengths.max())
        cache = self.new_cache(len(rows), longest)
        logits = np.empty(0, dtype=np.float32)
        for start in range(0, longest, chunk_size):
            stop = min(start + chunk_size, longest)
            ends_here = (lengths > start) & (lengths <= stop)
            part = self.run(prefill_inputs(rows, start, stop, predicted, self.config), cache)
            if start == 0:
                logits = np.empty((len(rows), self.config.vocab_size), dtype=part.dtype)
            logits[ends_here] = part
        cache.lengths[:] = lengths
        return logits, cache

    def prefill_chunk(self, ids: Sequence[int], next_modality: str, cache: KVCache, is_last: bool = True) -> Logits:
        """Read the next ids of one row's prompt behind what its cache holds: a prompt in pieces, others' steps between them.

        Args:
            ids: the next ids, at least one.
            next_modality: the modality predicted behind the prompt's end.
            cache: of one row; grown where it is full.
            is_last: whether the prompt ends here; where it does not, no logits are computed.

        Returns:
            Logits [1, v] behind the last id; [0, v] where the prompt goes on.

        Raises:
            InputError: for a cache of several rows, or ids or a name out of range.
            CapacityError: for more positions than the model holds; before anything is computed.
        """
        self.refuse_closed()
        self._refuse_foreign(cache)
        if cache.batch_size != 1:
            raise InputError(f"a prompt in pieces is one row's, and the cache has {cache.batch_size} rows")
        (row,) = check_prompts([ids], self.config)
        predicted = self._modality_indices(next_modality, 1)
        start = int(cache.lengths[0])
        self.reserve(cache, start + len(row))
        wanted = np.arange(len(row) - 1, len(row) if is_last else len(row) - 1, dtype=np.int64)
        ids_2d = row[None]
        inputs = StepInputs(
            ids_2d, modality_of_ids(ids_2d, self.config), cache.lengths.copy(), wanted, predicted[: len(wanted)]
        )
        logits = self.run(inputs, cache)
        cache.lengths[0] = start + len(row)
        return logits

    def decode_step(
        self,
        token_ids: Sequence[int],
        next_modality: str | Sequence[str],
        cache: KVCache,
        *,
        active: Sequence[int] | None = None,
    ) -> Logits:
        """Take one more token per row.

        Args:
            token_ids: [b] the newest id of each row; of rows that are not active, any.
            next_modality: predicted behind them: one name for all, or one per active row.
            cache: grown by buckets where it is full.
            active: numbers of the rows that go on, ascending; None: all. The others keep what they hold, and may go on
                later.

        Returns:
            Logits, one row [v] per active row.

        Raises:
            InputError: for wrong numbers of ids or names, or ids out of range.
            CapacityError: when an active row already holds the model's maximum; before anything is computed.
        """
        self.refuse_closed()
        self._refuse_foreign(cache)
        rows = np.arange(cache.batch_size) if active is None else as_whole_numbers(active)
        ids = as_whole_numbers(token_ids)
        if ids is None or len(ids) != cache.batch_size:
            raise InputError(f"token_ids must be {cache.batch_size} whole numbers, one per row ({brief(token_ids)} came)")
        if rows is None or len(rows) == 0 or rows.min() < 0 or rows.max() >= cache.batch_size or (np.diff(rows) <= 0).any():
            raise InputError(f"active must name rows in 0..{cache.batch_size - 1}, ascending ({brief(active)} came)")
        if not (ids[rows].min() >= 0 and ids[rows].max() < self.config.vocab_size):
            raise InputError(f"token_ids must be in 0..{self.config.vocab_size - 1} ({brief(token_ids)} came)")
        if not cache.lengths.all():
            raise InputError("the cache has rows that hold nothing: prefill them first")
        predicted = self._modality_indices(next_modality, len(rows))
        # Room behind every row that can still go on: resting rows are written there too.
        self.reserve(cache, int(cache.lengths[rows].max()) + 1)
        self.reserve(cache, min(int(cache.lengths.max()) + 1, self.config.max_seq_len))
        inputs = decode_inputs(ids, cache.lengths, rows, predicted, cache.capacity, self.config)
        logits = self.run(inputs, cache)
        cache.lengths[rows] += 1
        return logits

    def generate(
        self,
        prompt: "Prompt",
        *,
        schedule: Schedule | None = None,
        sampling: SamplingByModality | Sequence[SamplingByModality] | None = None,
        max_tokens: int | None = None,
        stop_ids: Sequence[int] = (),
    ) -> "Iterator[Step]":
        """Say what comes after ``prompt``, a step at a time; see ``decoding.generate``."""
        from motrt.runtime.decoding import generate

        return generate(self, prompt, schedule=schedule, sampling=sampling, max_tokens=max_tokens, stop_ids=stop_ids)

    def refuse_closed(self) -> None:
        """Raise BackendError where the session was closed, or opened by the process that this one was forked off."""
        self._refuse_another_process()
        if self._is_closed:
            raise BackendError("this session is closed: open the bundle again with motrt.load")

    def _refuse_another_process(self) -> None:
        if self._process != os.getpid():
            raise BackendError(
                f"this session was opened in process {self._process}, and process {os.getpid()} was forked off that without "
                "its threads: open the bundle with motrt.load in each process"
            )

    def _refuse_foreign(self, cache: KVCache) -> None:
        if not isinstance(cache, KVCache):
            raise InputError(f"cache must be what prefill or new_cache gave ({type(cache).__name__} came)")
        if cache.maker is not self:
            raise InputError("this cache was made by another session: prefill again with this one")

    def _modality_indices(self, names: str | Sequence[str], count: int) -> NDArray[np.int64]:
        if not isinstance(names, str | Sequence | np.ndarray) or getattr(names, "ndim", 1) == 0:
            raise InputError(f"next_modality must be one name, or one per row ({brief(names)} came)")
        listed = [names] * count if isinstance(names, str) else list(names)
        if len(listed) != count:
            raise InputError(f"next_modality must be one name, or {count} names, one per row ({len(listed)} came)")
        known = self.config.modality_names
        unknown = sorted({str(name) for name in listed if name not in known})
        if unknown:
            raise InputError(f"no modality {', '.join(map(repr, unknown))} in this model: it has {', '.join(known)}")
        return np.array([known.index(name) for name in listed], dtype=np.int64)

    def _check_mask(self, rows: Sequence[NDArray[np.int64]], modality_mask: Sequence[Sequence[int]]) -> None:
        if not isinstance(modality_mask, Sequence | np.ndarray) or len(modality_mask) != len(rows):
            raise InputError(f"modality_mask must have one row per prompt, {len(rows)} ({brief(modality_mask)} came)")
        for row, mask in zip(rows, modality_mask, strict=True):
            marked = as_whole_numbers(mask)
            if marked is None or marked.shape != row.shape:
                raise InputError(f"modality_mask must hold one whole number per id, {len(row)} ({brief(mask)} came)")
            inputs = StepInputs(row[None], marked[None], np.zeros(1, np.int64), *[np.empty(0, np.int64)] * 2)
            check_inputs(inputs, self.config, 1, self.config.max_seq_len)

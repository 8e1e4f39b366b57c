"""Sessions against the decoder they run: prompts and steps of any shape, the cache in place, and what they refuse."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motrt.errors import BackendError, CapacityError, InputError
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import CANONICAL
from motrt.runtime import step_inputs
from motrt.runtime.kv_cache import SMALLEST_CAPACITY, KVCache
from motrt.runtime.load import load
from motrt.runtime.onnx_session import OnnxSession
from motrt.runtime.session import Logits, Session
from motrt.runtime.step_inputs import decode_inputs

TEXT, AUDIO = [5, 17, 80, 2, 2, 91, 33], [96, 127, 101, 101, 110, 98, 125, 99, 96]
MIXED = [1, 2, 100, 101, 102, 103, 7, 120, 9]
RAGGED = [TEXT, AUDIO, MIXED, [3], [127]]
NEXT = ["text", "audio", "audio", "audio", "text"]  # rows 3 and 4 change over


def assert_close(came: Logits, expected: Logits) -> None:
    """Equal but for rounding: float32's largest error in so small a model is a hundred times smaller than this."""
    np.testing.assert_allclose(came, expected, rtol=1e-4, atol=1e-4)


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(value) for value in np.random.default_rng(seed).integers(0, 128, count)]


def contents(session: Session, cache: KVCache) -> list[np.ndarray[Any, Any]]:
    """Keys and values of every layer, copied."""
    return [value.numpy().copy() for value in cache.buffers.values]


def decode(session: Session, prompt: Sequence[int], ids: Sequence[int], modality: str = "text") -> Logits:
    """Logits after the prompt and after each further id, [1 + ids, v]."""
    logits, cache = session.prefill([prompt], modality)
    rows = [logits[0]]
    rows += [session.decode_step([token], modality, cache)[0] for token in ids]
    return np.stack(rows)


def test_ragged_prompts_of_every_modality_are_read_as_the_decoder_reads_them(onnx: Session, reference: Session) -> None:
    expected, _ = reference.prefill(RAGGED, NEXT)
    came, cache = onnx.prefill(RAGGED, NEXT)
    assert came.dtype == np.float32
    assert cache.lengths.tolist() == [len(row) for row in RAGGED]
    assert_close(came, expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 9, 100])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(onnx: Session, chunk_size: int) -> None:
    whole, _ = onnx.prefill(RAGGED, NEXT)
    chunked, cache = onnx.prefill(RAGGED, NEXT, chunk_size=chunk_size)
    assert_close(chunked, whole)
    after = onnx.decode_step([1, 2, 97, 98, 3], "text", cache)
    _, other = onnx.prefill(RAGGED, NEXT)
    assert_close(after, onnx.decode_step([1, 2, 97, 98, 3], "text", other))


def test_steps_over_every_border_of_the_cache_up_to_its_end_are_the_decoders(onnx: Session, reference: Session) -> None:
    prompt, ids = random_ids(60), random_ids(onnx.config.max_seq_len - 60, seed=1)
    expected, came = decode(reference, prompt, ids), decode(onnx, prompt, ids)
    assert len(came) == 1 + onnx.config.max_seq_len - 60
    assert_close(came, expected)


def test_rows_alone_are_the_rows_in_the_batch(onnx: Session) -> None:
    together, cache = onnx.prefill(RAGGED, NEXT)
    next_ids = [4, 99, 100, 101, 6]
    stepped = onnx.decode_step(next_ids, NEXT, cache)
    for number, row in enumerate(RAGGED):
        alone, own = onnx.prefill([row], NEXT[number])
        assert_close(alone[0], together[number])
        step = onnx.decode_step([next_ids[number]], NEXT[number], own)
        assert_close(step[0], stepped[number])


def test_rows_that_rest_are_not_moved(onnx: Session) -> None:
    _, cache = onnx.prefill(RAGGED, NEXT)
    _, undisturbed = onnx.prefill(RAGGED, NEXT)
    for token in (4, 100, 5):
        # Whatever is said for rows that rest: ids of other rows, of other modalities, or none at all.
        logits = onnx.decode_step([99, token, 7, token, -1], "audio", cache, active=[1, 3])
        assert logits.shape == (2, onnx.config.vocab_size)
    assert cache.lengths.tolist() == [7, 12, 9, 4, 1]
    came = onnx.decode_step([8, -1, 8, 5, 8], "text", cache, active=[0, 2, 4])
    expected = onnx.decode_step([8, 8, 8, 8, 8], "text", undisturbed)
    assert_close(came, expected[[0, 2, 4]])


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_ids_outside_the_predicted_modality_are_minus_infinity(onnx: Session, modality: str) -> None:
    logits, _ = onnx.prefill(RAGGED, modality)
    owned = onnx.config.id_ranges[onnx.config.modality_index(modality)]
    assert np.isfinite(logits[:, owned.start : owned.stop]).all()
    assert np.isneginf(np.delete(logits, list(owned), axis=1)).all()


def test_a_cache_that_grows_keeps_what_it_holds(onnx: Session) -> None:
    _, cache = onnx.prefill([random_ids(50), random_ids(30)], "text")
    before = contents(onnx, cache)
    assert cache.capacity == 64
    onnx.reserve(cache, 65)
    assert cache.capacity == 128
    for old, new in zip(before, contents(onnx, cache), strict=True):
        assert new.shape[2] == 128
        np.testing.assert_array_equal(new[:, :, :64], old)
        assert not new[:, :, 64:].any()


def test_a_step_writes_into_the_very_buffers_it_was_given(onnx: Session) -> None:
    _, cache = onnx.prefill([TEXT], "text")
    buffers = [value.numpy() for value in cache.buffers.values]
    addresses = [value.data_ptr() for value in cache.buffers.values]
    assert all(array[0, :, len(TEXT) - 1].any() and not array[0, :, len(TEXT)].any() for array in buffers)
    onnx.decode_step([4], "text", cache)
    assert [value.data_ptr() for value in cache.buffers.values] == addresses
    assert all(value.numpy()[0, :, len(TEXT)].any() for value in cache.buffers.values)


@pytest.mark.parametrize("backend", ["onnx", "reference"])
def test_one_token_past_the_maximum_is_refused_before_anything_is_computed(
    backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Session = request.getfixturevalue(backend)
    longest = session.config.max_seq_len
    _, cache = session.prefill([random_ids(longest), TEXT], "text")
    monkeypatch.setattr(type(session), "execute", lambda *arguments: pytest.fail("something was computed"))
    before = (cache.lengths.copy(), cache.capacity, cache.buffers)
    with pytest.raises(CapacityError, match=f"{longest + 1} positions are more than the {longest}"):
        session.decode_step([1, 1], "text", cache)
    assert cache.lengths.tolist() == before[0].tolist()
    assert (cache.capacity, cache.buffers) == before[1:]
    with pytest.raises(CapacityError, match=f"{longest + 1} positions"):
        session.prefill([random_ids(longest + 1)], "text")


def test_rows_that_rest_read_no_weights_of_another_modality() -> None:
    inputs = decode_inputs(
        np.array([1, 100, 2]), np.array([3, 4, 64]), np.array([1]), np.array([1]), capacity=64, config=ModelConfig.tiny()
    )
    assert inputs.modality_mask.tolist() == [[1], [1], [1]]
    assert inputs.cache_position.tolist() == [3, 4, 63]


def test_a_row_that_filled_its_bucket_rests_unharmed(onnx: Session) -> None:
    filled, other = random_ids(SMALLEST_CAPACITY), random_ids(3)
    _, cache = onnx.prefill([filled, other], "text")
    onnx.decode_step([0, 5], "text", cache, active=[1])
    assert_close(onnx.decode_step([6, 0], "text", cache, active=[0])[0], decode(onnx, filled, [6])[1])


def test_a_row_that_is_full_may_rest_while_others_go_on(onnx: Session) -> None:
    full = random_ids(onnx.config.max_seq_len)
    _, cache = onnx.prefill([full, TEXT], "text")
    came = onnx.decode_step([full[-1], 4], "text", cache, active=[1])
    assert_close(came[0], decode(onnx, TEXT, [4])[1])


def test_a_step_that_failed_leaves_the_cache_as_it_was(onnx: Session) -> None:
    _, cache = onnx.prefill([TEXT], "text")
    wrong: list[tuple[Any, str]] = [([999], "text"), ([1], "smell"), ([1, 2], "text"), ([1.5], "text")]
    for token_ids, modality in wrong:
        with pytest.raises(InputError):
            onnx.decode_step(token_ids, modality, cache)
    assert cache.lengths.tolist() == [len(TEXT)]
    np.testing.assert_array_equal(onnx.decode_step([4], "text", cache)[0], decode(onnx, TEXT, [4])[1])


def test_a_backend_that_fails_in_a_step_leaves_the_cache_usable(onnx: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            raise RuntimeError("the machine is on fire")

    _, cache = onnx.prefill([TEXT], "text")
    with monkeypatch.context() as patch:
        assert isinstance(onnx, OnnxSession)
        patch.setitem(onnx._loaded, CANONICAL, replace(onnx._loaded[CANONICAL], session=Broken()))
        with pytest.raises(BackendError, match="on fire"):
            onnx.decode_step([4], "text", cache)
    assert cache.lengths.tolist() == [len(TEXT)]
    np.testing.assert_array_equal(onnx.decode_step([4], "text", cache)[0], decode(onnx, TEXT, [4])[1])


def test_inputs_that_do_not_lie_in_one_piece_are_read_rightly(onnx: Session) -> None:
    rows = [np.array(row[:4]) for row in (TEXT, AUDIO, MIXED)]
    inputs = step_inputs.prefill_inputs(rows, 0, 4, np.array([0, 1, 0]), onnx.config)
    scattered = replace(
        inputs,
        input_ids=np.asfortranarray(inputs.input_ids),
        modality_mask=np.asfortranarray(inputs.modality_mask),
        logits_index=np.repeat(inputs.logits_index, 2)[::2],
    )
    assert not scattered.input_ids.flags.c_contiguous
    expected = onnx.run(inputs, onnx.new_cache(3))
    np.testing.assert_array_equal(onnx.run(scattered, onnx.new_cache(3)), expected)


WATCH = """
import sys, pathlib, numpy as np
from motrt.runtime.bundle import open_bundle
from motrt.model_def.graph import CANONICAL
from motrt.runtime.onnx_session import OnnxSession
bundle = open_bundle(sys.argv[1])
session = OnnxSession(bundle.model_path, bundle.config, num_threads=1, log_severity=2)
prompts = [[1, 2, 3] * 20, [100, 101, 102]]
if sys.argv[2] == "bound":
    _, cache = session.prefill(prompts, "text", chunk_size=7)
    for token in range(10):  # the cache grows on the way
        session.decode_step([token, 97 + token], "audio", cache)
    assert cache.capacity == 128
else:
    buffers = {one.name: np.zeros((1, 2, 64, 16), np.float32) for one in session._loaded[CANONICAL].session.get_inputs()[5:]}
    ids = np.array([[1]])
    zero = np.zeros(1, np.int64)
    feeds = {"input_ids": ids, "modality_mask": ids * 0, "cache_position": zero, "logits_index": zero, "head_mask": zero}
    session._loaded[CANONICAL].session.run(None, feeds | buffers)
print("done")
"""


@pytest.mark.parametrize(("way", "is_copied"), [("bound", False), ("unbound", True)])
def test_onnxruntime_says_that_it_copies_the_cache_only_where_it_is_not_bound(
    way: str, is_copied: bool, tiny_bundle: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", WATCH, tiny_bundle, way], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert ("in-place" in done.stderr.lower()) is is_copied, done.stderr


def test_logits_are_the_callers_own(onnx: Session) -> None:
    first, cache = onnx.prefill([TEXT], "text")
    kept = first.copy()
    second = onnx.decode_step([4], "text", cache)
    third = onnx.decode_step([90], "text", cache)
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(second, third)


def test_threads_with_caches_of_their_own_may_share_a_session(onnx: Session) -> None:
    prompts = [random_ids(40 + number, seed=number) for number in range(6)]
    further = [random_ids(30, seed=100 + number) for number in range(6)]
    expected = [decode(onnx, *both) for both in zip(prompts, further, strict=True)]
    with ThreadPoolExecutor(3) as threads:
        came = list(threads.map(lambda both: decode(onnx, *both), zip(prompts, further, strict=True)))
    for one, other in zip(came, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_sessions_at_once_do_not_meet(onnx: Session, tiny_bundle: Path) -> None:
    with load(tiny_bundle, num_threads=1) as other:
        _, mine = onnx.prefill([TEXT], "text")
        _, theirs = other.prefill([AUDIO], "text")
        np.testing.assert_array_equal(other.decode_step([4], "text", theirs), decode(onnx, AUDIO, [4])[1:])
        np.testing.assert_array_equal(onnx.decode_step([4], "text", mine), decode(other, TEXT, [4])[1:])


@pytest.fixture(params=["onnxruntime", "torch"])
def closed(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, backend=request.param) as session:
        session.prefill([TEXT], "text")
    yield session


def test_a_closed_session_says_so_whatever_is_asked_of_it(closed: Session, onnx: Session) -> None:
    _, cache = onnx.prefill([TEXT], "text")
    inputs = step_inputs.prefill_inputs([np.array(TEXT)], 0, 1, np.array([0]), onnx.config)
    for ask in (
        lambda: closed.prefill([TEXT], "text"),
        lambda: closed.decode_step([1], "text", cache),
        lambda: closed.generate(TEXT, max_tokens=1),
        lambda: closed.new_cache(1),
        lambda: closed.reserve(cache, 100),
        lambda: closed.run(inputs, cache),
        closed.__enter__,
    ):
        with pytest.raises(BackendError, match="closed: open the bundle again"):
            ask()
    closed.close()  # twice is once


def test_a_session_closed_halfway_through_a_generation_says_so(tiny_bundle: Path) -> None:
    session = load(tiny_bundle)
    steps = session.generate(TEXT, max_tokens=5)
    next(steps)
    session.close()
    with pytest.raises(BackendError, match="closed"):
        next(steps)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, c: s.decode_step([1], "text", c), "token_ids must be 2 whole numbers"),
        (lambda s, c: s.decode_step([1, 2.0], "text", c), "token_ids must be 2 whole numbers"),
        (lambda s, c: s.decode_step([1, [2]], "text", c), "token_ids must be 2 whole numbers"),
        (lambda s, c: s.decode_step(None, "text", c), "token_ids must be 2 whole numbers"),
        (lambda s, c: s.decode_step([1, -1], "text", c), r"token_ids must be in 0\.\.127"),
        (lambda s, c: s.decode_step([1, 128], "text", c), r"token_ids must be in 0\.\.127"),
        (lambda s, c: s.decode_step([1, 2], "smell", c), "no modality 'smell' in this model: it has text, audio"),
        (lambda s, c: s.decode_step([1, 2], None, c), "next_modality must be one name"),
        (lambda s, c: s.decode_step([1, 2], ["text"], c), "next_modality must be one name, or 2 names"),
        (lambda s, c: s.decode_step([1, 2], ["text", 1], c), "no modality '1'"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[1, 0]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[0, 0]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[2]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[0.5]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[True, False]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", c, active=[[0, 1]]), "active must name rows"),
        (lambda s, c: s.decode_step([1, 2], "text", s.new_cache(2)), "rows that hold nothing: prefill them first"),
        (lambda s, c: s.prefill([], "text"), "no prompt"),
        (lambda s, c: s.prefill([[]], "text"), "prompt 0 is empty"),
        (lambda s, c: s.prefill([[1]], "text", chunk_size=0), "chunk_size"),
        (lambda s, c: s.prefill([[1]], "text", chunk_size=1.5), "chunk_size"),
        (
            lambda s, c: s.prefill([[1]], "text", modality_mask=[[1]]),
            "contradicts input_ids.*which is text, and is marked audio",
        ),
        (lambda s, c: s.prefill([[99]], "text", modality_mask=[[0]]), "which is audio, and is marked text"),
        (lambda s, c: s.prefill([[1]], "text", modality_mask=[[2]]), r"modality_mask must be in 0\.\.1 \(2 came"),
        (lambda s, c: s.prefill([[1]], "text", modality_mask=[[0, 0]]), "modality_mask must hold one whole number per id, 1"),
        (lambda s, c: s.prefill([[1]], "text", modality_mask=[[False]]), "modality_mask must hold one whole number per id"),
        (lambda s, c: s.prefill([[1]], "text", modality_mask=[[0], [0]]), "modality_mask must have one row per prompt, 1"),
        (lambda s, c: s.prefill([[1]], "text", modality_mask=5), "modality_mask must have one row per prompt"),
        (lambda s, c: s.new_cache(0), "at least one"),
        (lambda s, c: s.new_cache(1.5), "at least one"),
        (lambda s, c: s.new_cache(1, 129), "129 positions are more"),
    ],
)
def test_what_no_session_can_do_is_a_sentence(call: Any, said: str, onnx: Session) -> None:
    _, cache = onnx.prefill([[1, 2, 3], [7, 8]], "text")
    with pytest.raises(InputError, match=said):
        call(onnx, cache)
    assert cache.lengths.tolist() == [3, 2]


def test_a_mask_that_agrees_with_the_ids_changes_nothing(onnx: Session) -> None:
    expected, _ = onnx.prefill([MIXED], "text")
    came, _ = onnx.prefill([MIXED], "text", modality_mask=[[0, 0, 1, 1, 1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(came, expected)


def test_the_torch_session_refuses_nothing_that_onnxruntime_accepts(onnx: Session, tiny_bundle: Path) -> None:
    with load(tiny_bundle, backend="torch") as torch:
        assert (torch.precision, onnx.precision) == ("fp32", "fp32")
        assert torch.backend == "torch (cpu)"
        assert onnx.backend == "onnxruntime (CPU)"
        expected, cache = onnx.prefill(RAGGED, NEXT, chunk_size=4)
        came, other = torch.prefill(RAGGED, NEXT, chunk_size=4)
        assert_close(came, expected)
        step = ([1, 2, 97, 98, 3], ["audio", "text"])
        assert_close(torch.decode_step(*step, other, active=[0, 2]), onnx.decode_step(*step, cache, active=[0, 2]))


def test_a_cache_of_another_session_is_refused(onnx: Session, reference: Session) -> None:
    _, cache = reference.prefill([TEXT], "text")
    with pytest.raises(InputError, match="made by another session"):
        onnx.decode_step([1], "text", cache)
    with pytest.raises(InputError, match="NoneType came"):
        onnx.decode_step([1], "text", None)  # type: ignore[arg-type]


def test_prefill_never_reads_memory_that_it_did_not_write(reference: Session) -> None:
    """Rows of a float64 reference are not cast from what lay in memory before: a signalling NaN there would warn."""
    for _ in range(50):
        spoiled = np.full((len(RAGGED), reference.config.vocab_size), 0x7FA00000, dtype=np.uint32)
        del spoiled
        reference.prefill(RAGGED, NEXT, chunk_size=4)

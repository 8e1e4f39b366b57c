"""The example trains what it says, on a trunk of two layers: which policies teach sound, and that text stays what it was."""

import json
import wave
from collections.abc import Callable
from itertools import chain, pairwise, permutations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from motrt.errors import InputError, UntrainedRowsError
from motrt.examples.train_audio_expert import compare, prepare, train
from motrt.examples.train_audio_expert.code_rows import LOUDNESS, rows_from_sound
from motrt.examples.train_audio_expert.codes import BOOKS, frames_of
from motrt.examples.train_audio_expert.melodies import CLIP_SECONDS, SAMPLE_RATE, melody
from motrt.examples.train_audio_expert.prepare import Sound, melodies, prepared, recordings
from motrt.examples.train_audio_expert.train import Options, Result, batches, run, token_losses, trains_text
from motrt.export.bundle_from_checkpoint import export_bundle
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.initialize import random_tensors
from motrt.model_def.trainable import POLICIES, Policy, apply_policy

WHOLE = ModelConfig.tiny(max_seq_len=512)
TRUNK = WHOLE.replace(modalities=WHOLE.modalities[:1], head="shared", tied_embeddings=True)
NUM_CODES, STEPS = 64, 12
CHANCE = log(2048)

Trained = Callable[..., tuple[Result, Path]]


@pytest.fixture(scope="module")
def sound() -> Sound:
    return prepared(melodies(20), NUM_CODES)


@pytest.fixture(scope="module")
def trained(sound: Sound, make_checkpoint: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The tiny trunk with an audio expert, trained under a policy for a few steps; made once for each."""
    made: dict[tuple[str, str], tuple[Result, Path]] = {}

    def train_once(policy: Policy, embedding: Any = "sound") -> tuple[Result, Path]:
        if (policy, embedding) not in made:
            out = tmp_path_factory.mktemp("trained") / "model"
            options = Options(policy, steps=STEPS, rate=5e-3, width=16, hidden=32, embedding=embedding, eval_clips=2)
            lines: list[str] = []
            result = run(make_checkpoint(TRUNK), out, sound, options, lambda line: lines.append(json.dumps(line)))
            out.with_suffix(".jsonl").write_text("\n".join(lines))
            made[policy, embedding] = (result, out)
        return made[policy, embedding]

    return train_once


def test_the_same_seed_gives_the_same_sound_and_the_same_codes(sound: Sound) -> None:
    again = prepared(melodies(20), NUM_CODES)
    assert again.texts == sound.texts and np.array_equal(again.codes, sound.codes)
    other = prepared(melodies(20, seed=1), NUM_CODES)
    assert other.texts != sound.texts and not np.array_equal(other.codes, sound.codes)


def test_a_clip_is_sixty_frames_of_four_codes_and_each_code_tells_its_book(sound: Sound) -> None:
    assert sound.codes.shape == (20, 60 * BOOKS)
    book = sound.codes.reshape(20, 60, BOOKS) // (NUM_CODES // BOOKS)
    assert np.array_equal(book, np.broadcast_to(np.arange(BOOKS), book.shape))
    assert sound.codes.min() >= 0 and sound.codes.max() < NUM_CODES


def test_every_book_brings_the_sound_nearer(sound: Sound) -> None:
    frames = np.concatenate([frames_of(melody(number).samples) for number in range(20)])
    quantizer, left = sound.quantizer, []
    codes = quantizer.encode(frames).reshape(-1, BOOKS)
    for used in range(BOOKS + 1):
        told = sum((book[codes[:, n] % quantizer.size] for n, book in enumerate(quantizer.books[:used])), quantizer.mean)
        left.append(float(((frames - told) ** 2).mean()))
    assert all(later < 0.9 * earlier for earlier, later in pairwise(left)), left
    assert float(((frames - quantizer.decode(codes.reshape(-1))) ** 2).mean()) == pytest.approx(left[-1], rel=1e-4)


def test_what_is_prepared_is_read_back(sound: Sound, tmp_path: Path) -> None:
    sound.save(tmp_path / "sound")  # a name without an ending is kept as it is
    back = Sound.load(tmp_path / "sound")
    assert back.texts == sound.texts and np.array_equal(back.codes, sound.codes)
    assert np.array_equal(back.quantizer.books, sound.quantizer.books)
    (tmp_path / "else").write_text("no sound")
    with pytest.raises(InputError, match=r"make it with prepare\.py"):
        Sound.load(tmp_path / "else")


def test_rows_of_codes_are_loud_tell_their_book_and_lie_near_where_they_sound_alike(sound: Sound) -> None:
    known = torch.randn(500, 256, generator=torch.Generator().manual_seed(2)) * 0.3
    rows = rows_from_sound(sound.quantizer, known)
    size = sound.quantizer.size
    assert rows.shape == (NUM_CODES, 256)
    assert float(rows.std()) == pytest.approx(LOUDNESS * 0.3, rel=0.2)
    by_book = rows.view(BOOKS, size, 256)
    alike = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2).view(BOOKS, size, BOOKS, size)
    means = alike.mean(dim=(1, 3))
    assert all(float(means[book, book]) > 0.3 > abs(float(means[book, other])) for book, other in permutations(range(BOOKS), 2))
    sounds = torch.from_numpy(sound.quantizer.books[0])
    apart, rows_apart = torch.pdist(sounds), torch.pdist(by_book[0])
    assert float(torch.corrcoef(torch.stack([apart, rows_apart]))[0, 1]) > 0.9
    assert not torch.equal(rows, rows_from_sound(sound.quantizer, known, seed=1))


def write_wav(file: Path, samples: Any, rate: int = SAMPLE_RATE) -> None:
    with wave.open(str(file), "wb") as sound:
        sound.setparams((1, 2, rate, 0, "NONE", ""))
        sound.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())


def test_recordings_are_cut_into_clips_with_their_sentences(tmp_path: Path) -> None:
    one = melody(0).samples
    write_wav(tmp_path / "two_clips.wav", np.concatenate([one, one, one[:100]]))
    write_wav(tmp_path / "told.wav", one)
    (tmp_path / "told.txt").write_text("A tune.\n")
    clips = recordings(tmp_path)
    assert [clip.text for clip in clips] == ["A tune.", "two clips", "two clips"]
    assert all(len(clip.samples) == CLIP_SECONDS * SAMPLE_RATE for clip in clips)
    assert np.abs(clips[0].samples - one).max() < 1e-4


def test_recordings_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    write_wav(tmp_path / "slow.wav", melody(0).samples, rate=8000)
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    with pytest.raises(InputError, match=r"(?s)no\.wav: .*slow\.wav: 16000 Hz and 16 bits were expected, 8000 Hz"):
        recordings(tmp_path)
    with pytest.raises(InputError, match="holds no WAV file"):
        recordings(tmp_path.parent / "nothing")


@pytest.mark.parametrize("config", [WHOLE, WHOLE.replace(head="shared"), WHOLE.replace(head="shared", tied_embeddings=True)])
def test_the_loss_is_that_of_the_graph_contracts_logits(config: ModelConfig) -> None:
    decoder = Decoder.from_tensors(config, dict(random_tensors(config, 5)).__getitem__)
    ids = torch.cat([torch.randint(0, 96, (2, 5)), torch.randint(96, 128, (2, 9))], dim=1)
    mask = (ids >= 96).long()
    every = torch.arange(ids.numel())
    head = torch.cat([mask[:, 1:], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    logits, _ = decoder(ids, mask, torch.zeros(2, dtype=torch.int64), every, head.flatten(), decoder.new_cache(2, 14))
    expected = -logits.view(2, 14, -1).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(token_losses(decoder, ids, 5), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", [WHOLE, WHOLE.replace(head="shared", tied_embeddings=True)], ids=["split", "tied"])
def test_text_is_read_without_gradients_only_where_they_would_be_nothing(config: ModelConfig, policy: Policy) -> None:
    if policy == "adapters+audio-head" and config.head != "split":
        return
    ids = torch.cat([torch.arange(5).expand(2, 5), torch.arange(96, 114).view(2, 9)], dim=1)

    def gradients(text_moves: bool) -> dict[str, torch.Tensor]:
        decoder = Decoder.from_tensors(config, dict(random_tensors(config, 5)).__getitem__)
        apply_policy(decoder, config, policy)
        token_losses(decoder, ids, 5, text_moves).mean().backward()  # type: ignore[no-untyped-call]
        return {name: one.grad for name, one in decoder.named_parameters() if one.grad is not None and bool(one.grad.any())}

    whole, used = gradients(True), gradients(trains_text(config, policy))
    assert whole.keys() == used.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(used[name], gradient, rtol=1e-5, atol=1e-7)
    is_needed = policy == "adapters+head" and config.tied_embeddings
    assert trains_text(config, policy) == is_needed


def test_batches_hold_sentences_of_one_length_and_every_row_in_turn() -> None:
    rows = [train.Row(torch.arange(1000 * index, 1000 * index + 12 + text), text) for index, text in enumerate([1, 2] * 4)]
    drawn = [next(batch) for batch in [batches(rows, 2, 2, seed=0)] for _ in range(4)]
    assert sorted(chain.from_iterable((ids // 1000)[:, 0].tolist() for ids, _ in drawn)) == list(range(8))
    for ids, num_text in drawn:
        assert ids.shape == (2, num_text + 2 * BOOKS)
        place = (ids % 1000)[:, num_text] - num_text
        assert bool((place % BOOKS == 0).all()), "a piece begins with a frame"
        assert torch.equal((ids % 1000)[:, num_text:].diff(), torch.ones(2, 7, dtype=torch.int64))


def test_adapters_alone_never_learn_sound(trained: Trained) -> None:
    result, out = trained("adapters")
    assert result.before.audio == result.after.audio == pytest.approx(CHANCE, abs=1e-5)
    assert result.text_unchanged
    with pytest.raises(UntrainedRowsError, match=r"audio rows 96 to 2143 of output\.audio\.weight \(all 2048"):
        export_bundle(out, out.parent / "bundle", verify=False)
    assert result.untrained and not (out.parent / "bundle").exists()


@pytest.mark.parametrize("policy", ["adapters+head", "adapters+new-rows", "adapters+audio-head"])
def test_policies_that_free_the_new_rows_learn_sound(policy: Policy, trained: Trained) -> None:
    result, _ = trained(policy)
    assert result.before.audio == pytest.approx(CHANCE, abs=1e-5)
    assert result.after.audio < CHANCE - 1
    assert result.untrained == ()


@pytest.mark.parametrize("policy", ["adapters+new-rows", "adapters+audio-head"])
def test_text_stays_the_same_bit_for_bit_where_its_weights_are_frozen(
    policy: Policy, trained: Trained, make_checkpoint: Callable[[ModelConfig], Path]
) -> None:
    result, out = trained(policy)
    assert result.text_unchanged and result.before.text == result.after.text
    trunk, model = open_checkpoint(make_checkpoint(TRUNK)), open_checkpoint(out)
    ids, nothing = torch.arange(1, 40)[None], torch.zeros(39, dtype=torch.int64)
    said = []
    for one in (trunk, model):
        decoder = Decoder.from_tensors(one.config, one.read)
        said.append(decoder(ids, nothing[None], nothing[:1], torch.arange(39), nothing, decoder.new_cache(1, 39))[0][:, :96])
    assert torch.equal(*said)


def test_the_whole_head_changes_what_is_said_of_text(trained: Trained) -> None:
    result, _ = trained("adapters+head")
    assert not result.text_unchanged and result.before.text != result.after.text


def test_an_embedding_of_zeros_is_learnt_with_new_rows_and_refused_without(trained: Trained) -> None:
    assert trained("adapters+new-rows", "zero")[0].untrained == ()
    (untrained,) = trained("adapters+audio-head", "zero")[0].untrained
    assert "tok_embeddings.weight" in untrained


def test_what_was_trained_is_exported_and_trained_further(trained: Trained, sound: Sound, tmp_path: Path) -> None:
    before, out = trained("adapters+audio-head")
    bundle = export_bundle(out, tmp_path / "bundle", verify=False).bundle
    assert bundle.config == open_checkpoint(out).config
    assert bundle.config.modalities[1].vocab_size == 2048
    options = Options("adapters+audio-head", steps=1, rate=1e-9, adapter_rate=1e-9, eval_clips=2)
    further = run(out, None, sound, options, lambda line: None)
    assert further.before.audio == pytest.approx(before.after.audio, abs=1e-6)


def test_runs_are_laid_side_by_side(trained: Trained, tmp_path: Path) -> None:
    files = [trained(policy)[1].with_suffix(".jsonl") for policy in ("adapters", "adapters+audio-head")]
    asked = [*map(str, files), "--json", str(tmp_path / "found.json"), "--chart", str(tmp_path / "chart.svg")]
    done = CliRunner().invoke(compare.main, asked)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["adapters"]["audio"][-1] == trained("adapters")[0].after.audio
    assert "| adapters | 4,096 | 7.625 → 7.625 |" in done.output and "refuses it" in done.output
    chart = (tmp_path / "chart.svg").read_text()
    assert chart.count("<polyline") == 4 and "every code equally likely" in chart


def test_runs_that_looked_after_different_steps_are_not_drawn_over_each_other(trained: Trained, tmp_path: Path) -> None:
    whole = trained("adapters")[1].with_suffix(".jsonl").read_text().splitlines()
    (tmp_path / "short.jsonl").write_text("\n".join(line for line in whole if '"step": 10,' not in line))
    (tmp_path / "broken.jsonl").write_text("\n".join(whole[:-1]))
    runs = [compare.read_run(tmp_path / "short.jsonl"), compare.read_run(trained("adapters")[1].with_suffix(".jsonl"))]
    with pytest.raises(InputError, match="after different steps"):
        compare.chart(runs)
    with pytest.raises(InputError, match="is not the metrics of a run"):
        compare.read_run(tmp_path / "broken.jsonl")


def test_both_programs_run_from_the_command_line(make_checkpoint: Callable[[ModelConfig], Path], tmp_path: Path) -> None:
    data, out = tmp_path / "sound.npz", tmp_path / "model"
    made = CliRunner().invoke(prepare.main, [str(data), "--clips", "4", "--codes", "16"])
    assert made.exit_code == 0 and "4 clips of 1.2 s, 960 codes of 16" in made.output, made.output
    asked = [str(make_checkpoint(TRUNK)), str(out), "--data", str(data), "--steps", "1", "--policy", "adapters"]
    done = CliRunner().invoke(train.main, asked)
    assert done.exit_code == 0, done.output
    assert "adapters never changes the audio rows of the head" in done.output
    assert "text logits are the same bit for bit" in done.output and "refuses it" in done.output
    lines = [json.loads(line) for line in (tmp_path / "model.jsonl").read_text().splitlines()]
    assert lines[0]["options"]["policy"] == "adapters" and lines[-1]["result"]["steps"] == 1
    again = CliRunner().invoke(train.main, asked)
    assert again.exit_code == 1 and "is there already" in again.output


def test_what_does_not_fit_is_said_before_training(
    make_checkpoint: Callable[[ModelConfig], Path], sound: Sound, tmp_path: Path
) -> None:
    small = make_checkpoint(TRUNK.replace(max_seq_len=128))
    with pytest.raises(InputError, match="take 272 tokens, and this model holds 128"):
        run(small, tmp_path / "out", sound, Options("adapters"), lambda line: None)
    with pytest.raises(InputError, match="codes up to 63, the model audio ids for 0 to 31: prepare it with --codes 32"):
        run(make_checkpoint(WHOLE), tmp_path / "out", sound, Options("adapters"), lambda line: None)
    assert not (tmp_path / "out").exists()

"""Give a trained text model an audio expert, and train it on a CPU: from a trunk to a checkpoint that `motrt export` takes.

    python examples/train_audio_expert/train.py TRUNK OUT --policy adapters+audio-head --minutes 5

TRUNK is a native checkpoint of text alone (`motrt convert TRUNK --llama FOLDER`), or one with an audio expert already, which is
then trained further. Every row of a batch is a sentence and the codes of the sound that it describes, so that the change from
text to audio is trained as well. What may change is the policy's affair (``motrt.model_def.trainable``).
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from motrt.errors import ConfigError, InputError, MotrtError
from motrt.examples.train_audio_expert.code_rows import rows_from_sound
from motrt.examples.train_audio_expert.codes import BOOKS, FRAMES_PER_SECOND
from motrt.examples.train_audio_expert.prepare import CODES_IN_USE, Sound, melodies, prepared
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint, write_checkpoint
from motrt.model_def.config import AdapterExpert, Modality, ModelConfig
from motrt.model_def.decoder import Cache, Decoder, state_of
from motrt.model_def.expansion import Rows, with_modality
from motrt.model_def.head_surgery import Read, with_head
from motrt.model_def.heads import SplitHead
from motrt.model_def.health import diagnose
from motrt.model_def.parameters import EMBEDDING
from motrt.model_def.routing import OneRoute
from motrt.model_def.trainable import POLICIES, Policy, apply_policy, can_learn, count
from motrt.runtime.tokenizer import encode_text, read_tokenizer

AUDIO = "audio"
AUDIO_CODES = 2048
MOST_PROMPT = 32  # ids of a sentence; the rest is cut off

# Held out: what the model says of ordinary text must not change while it learns to make sound.
TEXT = """The river runs through the old town, past the mill and under two stone bridges, before it reaches the sea. In spring
the water is high and brown, and children stand on the bank to watch branches and barrels go by. By the end of summer there is
so little of it left that one can walk across. Most of the houses near the harbour were built by fishermen, and many of them are
still painted in the colours of the boats that once belonged to their owners."""


@dataclass(frozen=True)
class Options:
    """How a run goes.

    Attributes:
        policy: which weights may change.
        minutes: how long to train; ``steps`` comes first where it is given.
        steps: how many steps to train, or None.
        batch: clips of a step.
        frames: of each of them, 50 to the second.
        rate: AdamW's highest learning rate for the head and the embedding, reached after a tenth of the run; it falls to a
            tenth of it as a cosine does.
        adapter_rate: the same for the adapters. They write into a residual stream that a trained trunk has made large, so they
            need larger steps than a head that reads it normalised.
        width: of a new audio expert.
        hidden: of a new audio expert, between its two inner products.
        embedding: how the embedding's new rows start: made from their ``sound``, or as ``with_modality`` has it.
        seed: of all that is drawn.
        eval_clips: held-out clips that the audio loss is taken from.
        eval_every: steps from one look at the held-out clips to the next.
    """

    policy: Policy
    minutes: float = 5.0
    steps: int | None = None
    batch: int = 3
    frames: int = 20
    rate: float = 3e-4
    adapter_rate: float = 5e-3
    width: int = 128
    hidden: int = 512
    embedding: Rows | Literal["sound"] = "sound"
    seed: int = 0
    eval_clips: int = 4
    eval_every: int = 10


@dataclass(frozen=True)
class Losses:
    """What a model makes of what was held out, in nats a token.

    Attributes:
        audio: of codes.
        audio_by_book: the same for each of the four codebooks; the first code of a clip, predicted by text, is among them.
        text: of ordinary text.
    """

    audio: float
    audio_by_book: tuple[float, ...]
    text: float


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        before: held-out losses of the model as it was.
        after: as it is.
        steps: how many were made.
        seconds: that they took, without the looks at what was held out.
        trained: how many elements the policy may change.
        audio_ids: how many codes the model knows.
        text_unchanged: whether every logit of the held-out text is the same bit for bit.
        untrained: the rows for which `motrt export` refuses the model, in words; none in a model that it takes.
    """

    before: Losses
    after: Losses
    steps: int
    seconds: float
    trained: int
    audio_ids: int
    text_unchanged: bool
    untrained: tuple[str, ...]


Report = Callable[[dict[str, Any]], None]
"""Told of every step."""


def with_audio(checkpoint: Checkpoint, sound: Sound, options: Options) -> tuple[ModelConfig, Read]:
    """Return the model with an audio expert: its own where it has one, otherwise a new one.

    Raises:
        ConfigError: when the model's first modality is audio.
    """
    config: ModelConfig = checkpoint.config
    read: Read = checkpoint.read
    if AUDIO in config.modality_names:
        if config.modality_names.index(AUDIO) == 0:
            raise ConfigError(f"{checkpoint.path} begins with audio: a model whose first modality is text was expected")
        return config, read
    expert = AdapterExpert(options.width, options.hidden)
    modality = Modality(AUDIO, AUDIO_CODES, expert, BOOKS, float(FRAMES_PER_SECOND))
    # Split before it grows: a tied head would take the embedding's new rows for its own.
    config, read = with_head(config, read, "split")
    rows: Rows = "copied" if options.embedding == "sound" else options.embedding
    config, read = with_modality(config, read, modality, rows, options.seed)
    return config, _read_with_code_rows(config, read, sound, options.seed) if options.embedding == "sound" else read


def _read_with_code_rows(config: ModelConfig, read: Read, sound: Sound, seed: int) -> Read:
    """The same weights, but the embedding's rows of the codes in use are made from their sound."""
    first = config.id_ranges[config.modality_index(AUDIO)].start

    def read_with_rows(name: str) -> Tensor:
        value = read(name)
        if name == EMBEDDING:
            rows = rows_from_sound(sound.quantizer, value[:first], seed)
            value[first : first + len(rows)] = rows[: len(value) - first]
        return value

    return read_with_rows


class TextIds:
    """Sentences as ids: by the tokenizer beside the checkpoint, or byte by byte where there is none."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer = read_tokenizer(checkpoint.tokenizer_path) if checkpoint.tokenizer_path is not None else None
        self.vocab_size = checkpoint.config.modalities[0].vocab_size

    def __call__(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [byte % self.vocab_size for byte in text.encode()]
        return list(encode_text(self.tokenizer, text).ids)


@dataclass(frozen=True)
class Row:
    """One training sequence: a sentence, then its sound.

    Attributes:
        ids: unified ids, [tokens].
        num_text: how many of them are the sentence's.
    """

    ids: Tensor
    num_text: int


def rows_of(sound: Sound, text_ids: TextIds, config: ModelConfig) -> list[Row]:
    """Every clip as a row, in the order of the clips.

    Raises:
        InputError: when the codes are more than the model has ids for, or a row is longer than it can hold.
    """
    ids = config.id_ranges[config.modality_index(AUDIO)]
    if int(sound.codes.max()) >= len(ids):
        raise InputError(
            f"the sound has codes up to {int(sound.codes.max())}, the model audio ids for 0 to {len(ids) - 1}: "
            f"prepare it with --codes {len(ids)}"
        )
    prompts = [text_ids(text)[:MOST_PROMPT] for text in sound.texts]
    longest = max(map(len, prompts)) + sound.codes.shape[1]
    if longest > config.max_seq_len:
        raise InputError(f"a sentence and its clip take {longest} tokens, and this model holds {config.max_seq_len}")
    if not all(prompts):
        raise InputError("every clip needs a sentence: the first code is predicted from its last word")
    codes = torch.from_numpy(sound.codes) + ids.start
    return [Row(torch.cat([torch.tensor(prompt), clip]), len(prompt)) for prompt, clip in zip(prompts, codes, strict=True)]


def token_losses(decoder: Decoder, ids: Tensor, num_text: int, text_moves: bool = True) -> Tensor:
    """The loss of every token but the first, in nats: ids [b, s], of which ``num_text`` a row are text -> [b, s - 1].

    The same numbers as from ``Decoder.forward``, for less: the text is read first and the sound behind it, each through its own
    weights without gathering, and logits are computed for the ids of the predicted modality alone.

    Args:
        decoder: the model.
        ids: rows whose sentences are equally long.
        num_text: at least 1.
        text_moves: whether anything that is trained lies on the text's way to the head; where nothing does, the text is read
            without a graph for gradients, which saves the larger expert's backward pass.
    """
    audio, owned = decoder.config.modality_index(AUDIO), decoder.config.id_ranges
    cache = decoder.new_cache(*ids.shape)
    with torch.set_grad_enabled(text_moves and torch.is_grad_enabled()):
        hidden, cache = read_on(decoder, ids[:, :num_text], 0, 0, cache)
    losses = [_losses(decoder, hidden[:, :-1], ids[:, 1:num_text] - owned[0].start, 0)]
    if num_text < ids.shape[1]:
        sung, _ = read_on(decoder, ids[:, num_text:], audio, num_text, cache)
        predicting = torch.cat([hidden[:, -1:], sung[:, :-1]], dim=1)  # the sentence's last word predicts the first code
        losses.append(_losses(decoder, predicting, ids[:, num_text:] - owned[audio].start, audio))
    return torch.cat(losses, dim=1)


def read_on(decoder: Decoder, ids: Tensor, modality: int, start: int, cache: Cache) -> tuple[Tensor, Cache]:
    """Read tokens of one modality behind ``start`` others: ids [b, s] -> normed hidden states [b, s, m], and the cache."""
    b, s = ids.shape
    at = decoder.positions(s, OneRoute(modality), torch.full((b,), start), cache)
    x, present = decoder.tok_embeddings(ids.flatten()), []  # [b, s] -> [T, m]
    for layer, past in zip(decoder.layers, cache, strict=True):
        x, new = layer(x, at, past)
        present.append(new)
    return decoder.norm(x).view(b, s, -1), present  # [T, m] -> [b, s, m]


def _losses(decoder: Decoder, hidden: Tensor, places: Tensor, modality: int) -> Tensor:
    """The losses of ids that are counted from their modality's first. Shapes: [b, s, m], [b, s] -> [b, s]."""
    logits = range_logits(decoder, hidden.flatten(0, 1), modality)
    return F.cross_entropy(logits, places.flatten(), reduction="none").view(places.shape)


def trains_text(config: ModelConfig, policy: Policy) -> bool:
    """Whether the policy trains weights that lie on the text's way to the head; the rows of a masked table do not."""
    embedding = policy == "adapters+head" and config.tied_embeddings
    return embedding or isinstance(config.modalities[0].expert, AdapterExpert)


def range_logits(decoder: Decoder, hidden: Tensor, modality: int) -> Tensor:
    """One modality's logits. Shapes: [n, m] -> [n, ids of the modality]."""
    if isinstance(decoder.output, SplitHead):
        return decoder.output.range_logits(hidden, modality)
    whole = decoder.tok_embeddings if decoder.output is None else decoder.output
    ids = decoder.config.id_ranges[modality]
    return F.linear(hidden, whole.weight[ids.start : ids.stop])  # type: ignore[index]


@torch.no_grad()
def held_out_losses(decoder: Decoder, rows: list[Row], text: Tensor) -> Losses:
    """The losses of held-out clips, row by row, and of ordinary text [1, s]."""
    codes = torch.stack([token_losses(decoder, row.ids[None], row.num_text)[0, row.num_text - 1 :] for row in rows])
    by_book = codes.view(len(rows), -1, BOOKS).mean(dim=(0, 1))  # [rows, codes] -> [rows, frames, BOOKS] -> [BOOKS]
    text_loss = token_losses(decoder, text, text.shape[1]).mean()
    return Losses(float(codes.mean()), tuple(by_book.tolist()), float(text_loss))


@torch.no_grad()
def text_logits(decoder: Decoder, text: Tensor) -> Tensor:
    """Every logit of text [1, s], as the graph contract has it: [s, v]."""
    s = text.shape[1]
    nothing = torch.zeros(s, dtype=torch.int64)
    logits, _ = decoder(text, nothing[None], nothing[:1], torch.arange(s), nothing, decoder.new_cache(1, s))
    return torch.as_tensor(logits)


def batches(rows: list[Row], size: int, frames: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Rows for ever, in a new order each time, those with sentences of one length together: ([b, s], text of a row).

    Of every clip ``frames`` are taken, or all that it has, from anywhere in it: sound goes on as it began, so short pieces of
    many clips teach more than one clip as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[int, list[Tensor]] = {}
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            row = rows[index]
            same = waiting.setdefault(row.num_text, [])
            same.append(_piece(row, frames, generator))
            if len(same) == size:
                yield torch.stack(same), row.num_text
                same.clear()


def _piece(row: Row, frames: int, generator: torch.Generator) -> Tensor:
    """The sentence and ``frames`` frames of its sound: [tokens]."""
    codes = row.ids[row.num_text :].view(-1, BOOKS)  # [frames * BOOKS] -> [frames, BOOKS]
    first = int(torch.randint(0, max(0, len(codes) - frames) + 1, (), generator=generator))
    return torch.cat([row.ids[: row.num_text], codes[first : first + frames].flatten()])


def optimizer_of(decoder: Decoder, options: Options) -> torch.optim.AdamW:
    """AdamW over what the policy trains. Tables have no decay: it would shrink the rows that are masked."""
    trained = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    adapters = [one for name, one in trained.items() if name.startswith("layers.")]
    tables = [one for name, one in trained.items() if not name.startswith("layers.")]
    groups = [{"params": adapters, "highest": options.adapter_rate, "weight_decay": 0.01}]
    groups += [{"params": tables, "highest": options.rate, "weight_decay": 0.0}] if tables else []
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def rate_at(share: float) -> float:
    """The part of the highest rate that is used when ``share`` of the run is done."""
    return min(1.0, share / 0.1 + 0.02) * (0.1 + 0.9 * (1 + math.cos(math.pi * min(1.0, share))) / 2)


def train(decoder: Decoder, rows: list[Row], num_held_out: int, text: Tensor, options: Options, report: Report) -> Result:
    """Train in place.

    Args:
        decoder: the model.
        rows: all clips; the last ``num_held_out`` are never trained on.
        num_held_out: how many.
        text: ordinary text, [1, s], never trained on.
        options: how.
        report: told of every step, and of the held-out losses.
    """
    apply_policy(decoder, decoder.config, options.policy)
    text_moves = trains_text(decoder.config, options.policy)
    held_out = rows[len(rows) - num_held_out :][: options.eval_clips]
    optimizer, drawn = (
        optimizer_of(decoder, options),
        batches(rows[: len(rows) - num_held_out], options.batch, options.frames, options.seed),
    )
    logits, before = text_logits(decoder, text), held_out_losses(decoder, held_out, text)
    report({"step": 0, "seconds": 0.0, "held_out": asdict(before)})
    step, seconds, share = 0, 0.0, 0.0
    while share < 1.0:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * rate_at(share)
        ids, num_text = next(drawn)
        losses = token_losses(decoder, ids, num_text, text_moves)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_((one for one in decoder.parameters() if one.requires_grad), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seconds = step + 1, seconds + time.monotonic() - started
        share = step / options.steps if options.steps is not None else seconds / (60 * options.minutes)
        line: dict[str, Any] = {"step": step, "seconds": round(seconds, 2), "share": round(min(1.0, share), 4)}
        line["audio"] = float(losses[:, num_text - 1 :].mean().detach())
        if step % options.eval_every == 0 and share < 1.0:
            line["held_out"] = asdict(held_out_losses(decoder, held_out, text))
        report(line)
    after = held_out_losses(decoder, held_out, text)
    report({"step": step, "seconds": round(seconds, 2), "share": 1.0, "held_out": asdict(after)})
    config = decoder.config
    return Result(
        before,
        after,
        step,
        round(seconds, 1),
        count(config, options.policy),
        config.modalities[config.modality_index(AUDIO)].vocab_size,
        torch.equal(logits, text_logits(decoder, text)),
        tuple(map(str, diagnose(config, dict(state_of(decoder)).__getitem__).untrained)),
    )


def run(trunk: Path, out: Path | None, sound: Sound | None, options: Options, report: Report) -> Result:
    """Grow ``trunk`` where it has no audio, train it, write ``out`` unless it is None.

    Raises:
        MotrtError: for anything that does not fit, before any training.
    """
    if out is not None and out.exists():
        raise InputError(f"{out} is there already: name a new folder, or remove it")
    checkpoint = open_checkpoint(trunk)
    if sound is None:
        sound = prepared(melodies(800, options.seed), CODES_IN_USE, options.seed)
    config, read = with_audio(checkpoint, sound, options)
    learns, why = can_learn(config, options.policy, AUDIO)
    report({"options": asdict(options), "config": config.to_dict(), "can_learn": learns, "why": why})
    text_ids = TextIds(checkpoint)
    rows = rows_of(sound, text_ids, config)
    text = torch.tensor([text_ids(TEXT)[: min(128, config.max_seq_len)]])
    decoder = Decoder.from_tensors(config, read)
    result = train(decoder, rows, sound.num_held_out, text, options, report)
    if out is not None:
        write_checkpoint(out, config, state_of(decoder), "float32", checkpoint.tokenizer_path)
    report({"result": asdict(result)})
    return result


def told(result: Result, out: Path | None) -> str:
    """A run in a few lines."""
    before, after = result.before, result.after
    books = ", ".join(f"c{number} {loss:.2f}" for number, loss in enumerate(after.audio_by_book))
    same = "text logits are the same bit for bit" if result.text_unchanged else "text logits have changed"
    refused = "\n  - ".join(["`motrt export` refuses it:", *result.untrained])
    return "\n".join(
        (
            f"{out or 'nothing written'}: {result.steps} steps in {result.seconds:.0f} s, {result.trained:,} weights trained",
            f"held out: audio {before.audio:.4f} -> {after.audio:.4f} ({books})",
            f"          text {before.text:.4f} -> {after.text:.4f}; {same}",
            refused if result.untrained else "`motrt export` takes it",
        )
    )


def progress(line: dict[str, Any]) -> str:
    """What is said of one line of the metrics while training goes on; nothing of most."""
    if not line.get("can_learn", True):
        return f"this run will not teach the model to make sound: {line['why']}"
    if "held_out" not in line:
        return ""
    losses = line["held_out"]
    done = f"step {line['step']:4d} {line['seconds']:6.0f} s"
    return f"{done}  held out: audio {losses['audio']:.4f}  text {losses['text']:.4f}"


PATH = click.Path(path_type=Path)
STARTS = ("sound", *get_args(Rows))


@click.command()
@click.argument("trunk", type=PATH)
@click.argument("out", type=PATH)
@click.option("--policy", type=click.Choice(POLICIES), default="adapters+audio-head", show_default=True)
@click.option("--minutes", type=click.FloatRange(0.01), default=5.0, show_default=True, help="How long to train.")
@click.option("--steps", type=click.IntRange(1), help="How many steps to train, whatever time they take.")
@click.option("--data", type=PATH, help="What prepare.py made.  [default: 800 melodies, made first]")
@click.option("--batch", type=click.IntRange(1), default=3, show_default=True, help="Clips of a step.")
@click.option("--frames", type=click.IntRange(1), default=20, show_default=True, help="Of each of them; 50 are a second.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True, help="Of head and rows.")
@click.option("--adapter-rate", type=click.FloatRange(0, min_open=True), default=5e-3, show_default=True, help="Of adapters.")
@click.option("--width", type=click.IntRange(1), default=128, show_default=True, help="Of a new audio expert.")
@click.option("--hidden", type=click.IntRange(1), default=512, show_default=True, help="Of a new audio expert.")
@click.option(
    "--embedding",
    type=click.Choice(["sound", "copied", "random", "zero"]),
    default="sound",
    show_default=True,
    help="New rows.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--dry", is_flag=True, help="Train and tell, but write no checkpoint.")
@click.option("--metrics", type=PATH, help="A line of JSON for every step.  [default: OUT with .jsonl behind it]")
def main(trunk: Path, out: Path, data: Path | None, threads: int, metrics: Path | None, dry: bool, **given: Any) -> None:
    """Put an audio expert onto TRUNK, train it, and write the checkpoint OUT."""
    torch.set_num_threads(threads)
    options = Options(**given)
    try:
        sound = Sound.load(data) if data is not None else None
        with (metrics or out.with_name(f"{out.name}.jsonl")).open("w", encoding="utf-8") as lines:

            def report(line: dict[str, Any]) -> None:
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                if words := progress(line):
                    click.echo(words, err=True)

            result = run(trunk, None if dry else out, sound, options, report)
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    click.echo(told(result, None if dry else out))


if __name__ == "__main__":
    main()

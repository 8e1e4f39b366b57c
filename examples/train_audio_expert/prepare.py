"""Sound and sentences made ready to train on: melodies of our own, or a folder of WAV files.

    python examples/train_audio_expert/prepare.py DATA.npz
    python examples/train_audio_expert/prepare.py DATA.npz --wav FOLDER

A folder holds 16 kHz, 16-bit WAV files; what is said of each stands in a .txt of the same name beside it, or is its name. Sound
is cut into clips of 1.2 seconds; what is left over at a file's end is dropped. The last tenth of the clips is held out.
"""

import json
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from motrt.errors import InputError, MotrtError, raise_all
from motrt.examples.train_audio_expert.codes import BOOKS, Codes, Frames, Quantizer, fit, frames_of
from motrt.examples.train_audio_expert.melodies import CLIP_SECONDS, SAMPLE_RATE, Clip, melody

CLIP_SAMPLES = round(CLIP_SECONDS * SAMPLE_RATE)
MOST_FITTED = 20_000  # frames that the quantiser is fitted to
CODES_IN_USE = 256  # of the model's 2048: so few are learnt within minutes, and melodies are told apart all the same


@dataclass(frozen=True)
class Sound:
    """Clips as codes.

    Attributes:
        texts: what is said of each clip.
        codes: [clips, codes of a clip], each in 0..BOOKS * quantizer.size - 1.
        quantizer: what made them.
    """

    texts: tuple[str, ...]
    codes: Codes
    quantizer: Quantizer

    @property
    def num_held_out(self) -> int:
        return max(1, len(self.texts) // 10)

    def save(self, file: Path) -> None:
        """Write one .npz."""
        mean, books = self.quantizer.mean, self.quantizer.books
        with file.open("wb") as stream:  # given a name, numpy would lengthen it
            np.savez_compressed(stream, texts=np.array(json.dumps(self.texts)), codes=self.codes, mean=mean, books=books)

    @classmethod
    def load(cls, file: Path) -> "Sound":
        """Read what ``save`` wrote.

        Raises:
            InputError: when it is no such file.
        """
        try:
            with np.load(file, allow_pickle=False) as held:
                texts = tuple(json.loads(str(held["texts"])))
                return cls(texts, held["codes"], Quantizer(held["mean"], held["books"]))
        except (OSError, ValueError, KeyError) as failure:
            raise InputError(f"{file} is no prepared sound ({failure}): make it with prepare.py") from None


def prepared(clips: list[Clip], num_codes: int, seed: int = 0) -> Sound:
    """Turn clips into codes by a quantiser that is fitted to those that are not held out.

    Args:
        clips: all of ``CLIP_SAMPLES``.
        num_codes: how many codes there are; each codebook gets its share. The model may have ids for more.
        seed: of the quantiser.

    Raises:
        InputError: where there is too little to fit to or to hold out.
    """
    if len(clips) < 2 or num_codes < BOOKS:
        raise InputError(f"at least 2 clips and {BOOKS} codes are needed ({len(clips)} and {num_codes} came)")
    frames = [frames_of(clip.samples) for clip in clips]
    kept = np.concatenate(frames[: len(frames) - max(1, len(frames) // 10)])
    chosen: Frames = kept[:: max(1, -(-len(kept) // MOST_FITTED))]
    quantizer = fit(chosen, num_codes // BOOKS, seed)
    return Sound(tuple(clip.text for clip in clips), np.stack([quantizer.encode(one) for one in frames]), quantizer)


def melodies(count: int, seed: int = 0) -> list[Clip]:
    return [melody(number, seed) for number in range(count)]


def recordings(folder: Path) -> list[Clip]:
    """Cut every WAV file of ``folder`` into clips.

    Raises:
        InputError: naming every file that is not 16 kHz and 16 bits, or when there is none.
    """
    files = sorted(folder.glob("*.wav"))
    found = [_clips_or_problem(file) for file in files]
    raise_all(InputError, f"{folder} holds files that can not be read:", [problem for _, problem in found if problem])
    clips = [clip for those, _ in found for clip in those]
    if not clips:
        raise InputError(f"{folder} holds no WAV file of {CLIP_SECONDS} seconds or more ({len(files)} WAV files were found)")
    return clips


def _clips_or_problem(file: Path) -> tuple[list[Clip], str]:
    try:
        return list(_cut(file)), ""
    except (OSError, EOFError, wave.Error, ValueError) as failure:
        return [], f"{file.name}: {failure}"


def _cut(file: Path) -> Iterator[Clip]:
    beside = file.with_suffix(".txt")
    text = beside.read_text(encoding="utf-8").strip() if beside.is_file() else file.stem.replace("_", " ")
    with wave.open(str(file), "rb") as sound:
        found = (sound.getframerate(), 8 * sound.getsampwidth())
        if found != (SAMPLE_RATE, 16):
            raise ValueError(f"{SAMPLE_RATE} Hz and 16 bits were expected, {found[0]} Hz and {found[1]} bits came: convert it")
        raw = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").reshape(-1, sound.getnchannels())
    samples = (raw.mean(axis=1) / 32768).astype(np.float32)
    for start in range(0, len(samples) - CLIP_SAMPLES + 1, CLIP_SAMPLES):
        yield Clip(text, samples[start : start + CLIP_SAMPLES])


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--wav", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Folder of WAV files.")
@click.option("--clips", type=click.IntRange(2), default=800, show_default=True, help="Melodies to make, without --wav.")
@click.option(
    "--codes", "num_codes", type=click.IntRange(BOOKS), default=CODES_IN_USE, show_default=True, help="Of all books together."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def main(out: Path, wav: Path | None, clips: int, num_codes: int, seed: int) -> None:
    """Make OUT, a .npz of sentences and codes."""
    try:
        sound = prepared(recordings(wav) if wav is not None else melodies(clips, seed), num_codes, seed)
    except MotrtError as failure:
        raise click.ClickException(str(failure)) from None
    sound.save(out)
    click.echo(f"{out}: {len(sound.texts)} clips of {CLIP_SECONDS} s, {sound.codes.size:,} codes of {num_codes}")


if __name__ == "__main__":
    main()

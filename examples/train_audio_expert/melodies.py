"""Sound to learn from where none is at hand: short melodies, each with the sentence that describes it.

A sentence names an instrument, a pace, a key, a scale and a shape, and the melody follows from it but for its first note, its
loudness and a little noise: so there is something to be learnt from the text and something from the sound before. Every clip
has a generator of its own, seeded by (seed, number): the same clip on every machine, up to the rounding of sines.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16000
CLIP_SECONDS = 1.2

Samples = NDArray[np.float32]  # [samples], between -1 and 1

# Loudness of the harmonics, and how long a note rings: seconds until it has lost two thirds; None holds it.
INSTRUMENTS: dict[str, tuple[tuple[float, ...], float | None]] = {
    "a flute": ((1.0, 0.2, 0.05), None),
    "an organ": ((1.0, 0.7, 0.5, 0.4, 0.3, 0.2), None),
    "a bell": ((1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.3), 0.25),
    "a guitar": ((1.0, 0.6, 0.4, 0.25, 0.15, 0.1), 0.12),
    "a clarinet": ((1.0, 0.05, 0.7, 0.05, 0.4, 0.05, 0.2), None),
}
PACES = {"slow": 0.3, "quick": 0.15}  # seconds a note
KEYS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}  # semitones above C4
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
SHAPES = {  # steps of the scale from one note to the next, over and over
    "rises": (1,),
    "falls": (-1,),
    "turns": (1, 1, -1, -1),
    "leaps": (2, -1),
    "stays": (0,),
}
MIDDLE_C = 261.63  # Hz, of C4 in equal temperament from A4 = 440


@dataclass(frozen=True)
class Clip:
    """Some sound and what is said of it.

    Attributes:
        text: a sentence.
        samples: mono, at ``SAMPLE_RATE``.
    """

    text: str
    samples: Samples


def melody(number: int, seed: int = 0) -> Clip:
    """Make one clip of ``CLIP_SECONDS``, always the same for the same (seed, number)."""
    chance = np.random.default_rng([seed, number])
    instrument, pace, key, scale, shape = (
        list(choices)[chance.integers(len(choices))] for choices in (INSTRUMENTS, PACES, KEYS, SCALES, SHAPES)
    )
    text = f"Play {instrument}: a {pace} tune in {key} {scale} that {shape}."
    seconds, steps = PACES[pace], SHAPES[shape]
    place = int(chance.integers(0, 7)) + (7 if shape == "falls" else 0)
    notes = []
    for index in range(round(CLIP_SECONDS / seconds)):
        octave, degree = divmod(place, 7)
        semitones = KEYS[key] + 12 * octave + SCALES[scale][degree]
        notes.append(_note(MIDDLE_C * 2 ** (semitones / 12), seconds, *INSTRUMENTS[instrument]))
        place += steps[index % len(steps)]
    loud = chance.uniform(0.15, 0.3) * np.concatenate(notes)
    noise = chance.normal(0.0, 1e-4, loud.shape)
    return Clip(text, (loud + noise).astype(np.float32))


def _note(pitch: float, seconds: float, harmonics: tuple[float, ...], ring: float | None) -> NDArray[np.float64]:
    """One note: harmonics below half the sample rate, a short rise, and a fall at the end."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    loudness = np.minimum(1.0, np.minimum(time, seconds - time) / 0.01)
    if ring is not None:
        loudness = loudness * np.exp(-time / ring)
    waves = [
        strength * np.sin(2 * np.pi * pitch * (index + 1) * time)
        for index, strength in enumerate(harmonics)
        if pitch * (index + 1) < SAMPLE_RATE / 2
    ]
    tone: NDArray[np.float64] = np.sum(waves, axis=0) * loudness / sum(harmonics)
    return tone

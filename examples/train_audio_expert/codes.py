"""Sound as codes: 50 frames a second, each told by four codes, by a residual quantiser that is fitted to the sound.

A frame is the logarithm of the energy in bands that lie evenly to the ear. The first codebook holds the frames that are most
typical (k-means), the second what the first leaves over, and so on. Each codebook has ids of its own: code = book * size + row,
so that a code tells which of the four it is. (EnCodec's four share their ids. Its codes can be trained on in the same way: only
this file would change.) Frames are laid flat, c0 c1 c2 c3 of the first, then of the second: 200 codes are a second.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from motrt.examples.train_audio_expert.melodies import SAMPLE_RATE, Samples

BOOKS = 4
FRAMES_PER_SECOND = 50
HOP = SAMPLE_RATE // FRAMES_PER_SECOND
WINDOW = 1024
BANDS = 64
LOWEST, HIGHEST = 100.0, 7500.0  # Hz, the first and the last band's middle
QUIETEST = 1e-3  # energy that is taken for silence

Frames = NDArray[np.float32]  # [frames, BANDS]
Codes = NDArray[np.int64]  # [frames * BOOKS]


@dataclass(frozen=True)
class Quantizer:
    """Four codebooks.

    Attributes:
        mean: of all frames, [BANDS].
        books: [BOOKS, size, BANDS].
    """

    mean: Frames
    books: NDArray[np.float32]

    @property
    def size(self) -> int:
        return int(self.books.shape[1])

    def encode(self, frames: Frames) -> Codes:
        """[frames, BANDS] -> codes, frame by frame."""
        rest, found = frames - self.mean, []
        for number, book in enumerate(self.books):
            rows = _nearest(rest, book)
            rest = rest - book[rows]
            found.append(rows + number * self.size)
        return np.stack(found, axis=1).reshape(-1)  # [frames, BOOKS] -> [frames * BOOKS]

    def decode(self, codes: Codes) -> Frames:
        """Codes, frame by frame -> [frames, BANDS]: the sum of the rows that they name."""
        rows = codes.reshape(-1, BOOKS) % self.size  # [frames * BOOKS] -> [frames, BOOKS]
        found = self.mean + sum(book[rows[:, number]] for number, book in enumerate(self.books))
        return np.asarray(found, dtype=np.float32)


def frames_of(samples: Samples) -> Frames:
    """[samples] -> [frames, BANDS], one for every 20 ms."""
    count = len(samples) // HOP
    padded = np.pad(samples, (WINDOW // 2, WINDOW))
    starts = np.arange(count)[:, None] * HOP + np.arange(WINDOW)
    spectrum = np.fft.rfft(padded[starts] * np.hanning(WINDOW), axis=1)  # [frames, WINDOW / 2 + 1]
    energy = (np.abs(spectrum) ** 2) @ _filters().T
    return np.asarray(np.log(energy + QUIETEST), dtype=np.float32)


def fit(frames: Frames, size: int, seed: int = 0, rounds: int = 12) -> Quantizer:
    """Fit codebooks of ``size`` rows each, one after another, each to what those before leave over."""
    chance = np.random.default_rng(seed)
    mean = frames.mean(axis=0)
    rest, books = frames - mean, []
    for _ in range(BOOKS):
        book = _k_means(rest, size, chance, rounds)
        rest = rest - book[_nearest(rest, book)]
        books.append(book)
    return Quantizer(mean, np.stack(books))


def _k_means(points: Frames, size: int, chance: np.random.Generator, rounds: int) -> Frames:
    """Centres of ``points``; one that has lost all its points begins again at one of them."""
    centres = points[chance.choice(len(points), size, replace=len(points) < size)]
    for _ in range(rounds):
        rows = _nearest(points, centres)
        counts = np.bincount(rows, minlength=size)
        order = np.argsort(rows, kind="stable")
        held = counts > 0
        sums = np.zeros((size, points.shape[1]))
        sums[held] = np.add.reduceat(points[order], (np.cumsum(counts) - counts)[held], axis=0)
        again = points[chance.integers(0, len(points), size)]
        centres = np.where(held[:, None], sums / np.maximum(counts, 1)[:, None], again).astype(np.float32)
    return centres


def _nearest(points: Frames, centres: Frames) -> NDArray[np.int64]:
    """The centre that lies nearest to each point. Shapes: [points, BANDS], [centres, BANDS] -> [points]."""
    away = (centres**2).sum(axis=1) - 2 * points @ centres.T  # the points' own squares are the same for every centre
    return np.asarray(np.argmin(away, axis=1), dtype=np.int64)


def _filters() -> NDArray[np.float64]:
    """Triangles that lie evenly on a logarithmic scale, each at least one line of the spectrum wide: [BANDS, lines]."""
    lines = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    middles = np.geomspace(LOWEST, HIGHEST, BANDS)
    width = np.maximum(middles * (middles[1] / middles[0] - 1), SAMPLE_RATE / WINDOW)
    found: NDArray[np.float64] = np.maximum(0.0, 1 - np.abs(lines - middles[:, None]) / width[:, None])
    return found

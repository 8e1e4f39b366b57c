"""First rows of the embedding for codes: which book a code is of, and how it sounds, said loudly enough to be heard.

An adapter expert stands in for the text's feed-forward at audio positions, and begins by adding nothing. Rows of the usual size
then drown: attention alone writes so much into the residual stream that the last hidden state no longer tells which code was
read, nor of which book it was. Rows a thousand times as large are still there at the end, and a head can learn from them. So a
frozen embedding is no hindrance, if it began well: README.md has the runs with and without.
"""

import torch
from torch import Tensor

from motrt.examples.train_audio_expert.codes import BOOKS, Quantizer

LOUDNESS = 1000.0  # times the deviation of the rows that are there


def rows_from_sound(quantizer: Quantizer, known: Tensor, seed: int = 0) -> Tensor:
    """Rows for the quantiser's codes, one half a direction of their book, one half the code's own sound, projected at random.

    Codes that sound alike begin alike. Shapes: known [rows, m] -> [BOOKS * size, m].
    """
    generator = torch.Generator().manual_seed(seed)
    sounds = torch.from_numpy(quantizer.books)  # [BOOKS, size, bands]
    sounds = sounds - sounds.mean(dim=1, keepdim=True)
    sounds = sounds / sounds.square().mean(dim=(1, 2), keepdim=True).sqrt().clamp(min=1e-6)
    width, bands = known.shape[1], sounds.shape[2]
    projection = torch.randn(BOOKS, bands, width, generator=generator) / bands**0.5
    book = torch.randn(BOOKS, 1, width, generator=generator)
    rows = (sounds @ projection + book) / 2**0.5  # [BOOKS, size, m], of deviation 1
    loud: Tensor = LOUDNESS * known.float().std(dim=0) * rows
    return loud.flatten(0, 1).to(known.dtype)

"""How much each input of a product matters: the mean of its squares over sequences, measured in the full model.

An error of a weight reaches the product as often as its input is large, so the quantiser weighs errors by this
(``quantize.choose_scales``). Sequences are the user's, or the model's own. Weights are read one module at a time, as the rest
of an export does it: sampling a token at a time would read all of them for every token, so whole sequences are sampled at once,
from random ids on. In every round one position in two is sampled anew, given what stands before it. Of a trained model, scales
weighed so lose hardly more than by sequences that were sampled token by token (decision 0025).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from motrt.export.parity.token_file import read_token_file
from motrt.export.steps import Advance
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.head_surgery import Read
from motrt.model_def.parameters import SHARED_HEAD
from motrt.runtime.tokenizer import read_tokenizer

# Sampled sequences: rows, tokens of each, rounds.
NUM_ROWS, NUM_TOKENS, NUM_ROUNDS = 8, 64, 4

# Of a file: tokens of one row, and of one pass, which costs what reading all weights costs.
FILE_ROW, TOKENS_PER_PASS = 128, 2048

# Heads are given one position in so many: logits over a whole vocabulary take more memory than any weight.
LOGITS_EVERY = 8

Importance = dict[str, Tensor]
"""A weight's name -> what the square of an error of each of its inputs counts, [in]."""


def rows_of_file(file: Path, checkpoint: Checkpoint) -> Tensor:
    """The sequences of a file of JSON lines, one after another, cut into rows [rows, tokens] of equal length.

    Args:
        file: see ``parity.token_file``.
        checkpoint: whose ids they are, and whose tokenizer reads lines of text.

    Raises:
        InputError: for a file that holds no sequences of this model.
    """
    tokenizer = None if checkpoint.tokenizer_path is None else read_tokenizer(checkpoint.tokenizer_path)
    ids = torch.cat([torch.from_numpy(one) for one in read_token_file(file, checkpoint.config, tokenizer)])
    length = min(FILE_ROW, checkpoint.config.max_seq_len, len(ids))
    return ids[: len(ids) // length * length].reshape(-1, length)  # [ids] -> [rows, tokens]


def measure_importance(config: ModelConfig, read: Read, rows: Tensor | None, advance: Advance) -> Importance:
    """The mean square of every product's inputs.

    Args:
        config: what is quantised.
        read: its weights, by the names of ``parameters(config)``.
        rows: ids [rows, tokens] to read; None: the model samples them.
        advance: told the elements of each weight that is read.

    Returns:
        By weight; those that no token went through are absent, as are those whose inputs are no finite numbers.
    """

    def counted(name: str) -> Tensor:
        value = read(name)
        advance(value.numel())
        return value

    decoder = _WatchedDecoder(config, counted, torch.float32)
    rows = sample_rows(decoder) if rows is None else rows
    decoder.forget()
    for part in _passes(rows):
        _logits(decoder, part, torch.arange(0, part.numel(), LOGITS_EVERY))
    return decoder.mean_squares()


def num_passes(rows: Tensor | None) -> int:
    """How often ``measure_importance`` reads all weights."""
    return NUM_ROUNDS + 1 if rows is None else len(_passes(rows))


def _passes(rows: Tensor) -> tuple[Tensor, ...]:
    count = max(1, TOKENS_PER_PASS // rows.shape[1])
    return tuple(rows[start : start + count] for start in range(0, len(rows), count))


def sample_rows(decoder: StreamedDecoder, seed: int = 11) -> Tensor:
    """Sample sequences [rows, tokens] from the model: one of each modality alone, the others of all modalities in their order.

    A model that was trained on other turns wants ``--calibrate``.
    """
    config, chance = decoder.config, torch.Generator().manual_seed(seed)
    length, num_alone = min(NUM_TOKENS, config.max_seq_len), len(config.modalities)
    in_order = (torch.arange(length) * num_alone // length).expand(max(NUM_ROWS - num_alone, 1), -1)
    modality = torch.cat([torch.arange(num_alone)[:, None].expand(-1, length), in_order])  # [rows, tokens]
    first = torch.tensor([ids.start for ids in config.id_ranges])[modality]
    count = torch.tensor([len(ids) for ids in config.id_ranges])[modality]
    rows = first + (torch.rand(modality.shape, generator=chance, dtype=torch.float64) * count).long()
    for number in range(NUM_ROUNDS):
        # Flat positions of the tokens that are sampled anew, and of those before them.
        renewed = torch.arange(rows.numel()).view(rows.shape)[:, 1 + number % 2 :: 2].flatten()
        if not len(renewed):  # of rows of two tokens there is no third
            continue
        for at, logits in zip(renewed, _logits(decoder, rows, renewed - 1), strict=True):
            chances = logits.softmax(0)
            if bool(chances.isfinite().all()):
                rows.view(-1)[at] = torch.multinomial(chances, 1, generator=chance)[0]
    return rows


def _logits(decoder: StreamedDecoder, rows: Tensor, wanted: Tensor) -> Tensor:
    """Logits [wanted, v] of the flat positions ``wanted``, each of the modality that comes next in its row."""
    modality = _modality_of(rows, decoder.config)
    predicted = torch.cat([modality[:, 1:], modality[:, -1:]], 1).flatten()[wanted]
    start = torch.zeros(len(rows), dtype=torch.int64)
    with torch.inference_mode():
        logits, _ = decoder(rows, modality, start, wanted, predicted, decoder.new_cache(*rows.shape))
    found: Tensor = logits
    return found


def _modality_of(ids: Tensor, config: ModelConfig) -> Tensor:
    starts = torch.tensor([owned.start for owned in config.id_ranges[1:]], dtype=torch.int64)
    return torch.bucketize(ids, starts, right=True)


class _WatchedDecoder(StreamedDecoder):
    """A decoder that keeps the sum of squares of what each of its products reads."""

    def __init__(self, config: ModelConfig, read: Read, dtype: torch.dtype) -> None:
        super().__init__(config, read, dtype)
        self.forget()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" != SHARED_HEAD:
                module.register_forward_pre_hook(lambda module, given, name=f"{name}.weight": self._note(name, given[0]))

    def forget(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def mean_squares(self) -> Importance:
        found = {name: total / count for name, (total, count) in self._sums.items() if count}
        return {name: value for name, value in found.items() if bool(value.isfinite().all())}

    def logits(self, hidden: Tensor, head_mask: Tensor) -> Tensor:
        self._note(SHARED_HEAD, hidden)  # used as a matrix and not as a module, so no hook sees it
        return super().logits(hidden, head_mask)

    def _note(self, name: str, x: Tensor) -> None:
        """Add the squares of ``x`` [rows, in]."""
        total, count = self._sums.get(name, (torch.zeros(x.shape[1]), 0))
        self._sums[name] = total + x.float().square().sum(0), count + len(x)

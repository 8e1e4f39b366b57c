"""What error compensation (GPTQ) would bring to a bundle's weights, beside scales that are weighed by the same sequences.

    .venv/bin/python benchmarks/error_compensation.py BUNDLE --checkpoint MODEL --data text.jsonl [--json FILE]

Formats are the bundle's, and how its scales are chosen; table and head stay what they are there. Every other product is
quantized twice: to the nearest codes, and column by column, where what is lost of one column is made up for in those behind it
(Frantar et al., "GPTQ", 2022, algorithm 1, blocks of the format's size, dampened by a hundredth; inputs are those of the full
model, and not of the layers quantized before). Both for the ids that an export samples at once, and for eight times as many
that are sampled token by token. Measured is the mean KL divergence from the checkpoint, activations as they are.
"""

from collections.abc import Mapping
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from motrt.benchmarks.document import leave, machine
from motrt.errors import CheckpointError, InputError, MotrtError
from motrt.export.importance import sample_rows
from motrt.export.parity.quantization_loss import expected_of, losses_of, sampled_rows
from motrt.export.parity.token_file import read_token_file
from motrt.export.quantize import BlockScales, choose_scales, codes_under, dequantize
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.report import table
from motrt.export.streamed_decoder import StreamedDecoder
from motrt.model_def.checkpoint.native import open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import with_head
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import CODE_RANGE, Quantization, WeightFormat
from motrt.runtime.bundle import open_bundle
from motrt.runtime.step_inputs import modality_of_ids
from motrt.runtime.torch_session import TorchSession

TOKEN_BY_TOKEN = 32, 128  # sequences and their ids
DAMPENING = 0.01  # of the mean of the diagonal, as the authors have it
ROWS_OF_A_PASS = 8


def compensated(weight: Tensor, how: WeightFormat, squares: Tensor, quantization: Quantization) -> Tensor:
    """Return the dequantized weight [out, in] whose columns make up for the errors of those before them.

    Args:
        weight: [out, in].
        how: its format, symmetric.
        squares: the mean outer product of its inputs, [in, in].
        quantization: how scales are chosen.
    """
    left, done = weight.clone(), torch.empty_like(weight)
    (low, high), size = CODE_RANGE[how.stored], how.block_size or weight.shape[1]
    dampened = squares.clone()
    dampened.diagonal().add_(DAMPENING * squares.diagonal().mean())
    dampened.diagonal()[dampened.diagonal() == 0] = 1.0  # nothing was ever read there
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(dampened)), upper=True)
    for start in range(0, weight.shape[1], size):
        block = slice(start, start + size)
        ours, errors = left[:, block].clone(), torch.empty_like(left[:, block])
        scale = _chosen(ours, how, squares.diagonal()[block], quantization).scales[:, 0].float()
        for column in range(size):
            done[:, start + column] = (ours[:, column] / scale).round().clamp(low, high) * scale
            errors[:, column] = (ours[:, column] - done[:, start + column]) / inverse[start + column, start + column]
            ours[:, column + 1 :] -= errors[:, column, None] * inverse[start + column, start + column + 1 : start + size]
        left[:, start + size :] -= errors @ inverse[block, start + size :]
    return done


def nearest(weight: Tensor, how: WeightFormat, squares: Tensor, quantization: Quantization) -> Tensor:
    """Return the dequantized weight [out, in] of the nearest codes, as an export chooses them."""
    chosen = _chosen(weight, how, squares.diagonal(), quantization)
    return dequantize(codes_under(weight, how, chosen), how, chosen)


def _chosen(weight: Tensor, how: WeightFormat, squares: Tensor, quantization: Quantization) -> BlockScales:
    """Choose the scales of ``weight`` [out, in], or of some of its columns, by the mean squares of their inputs [in]."""
    dtype = torch.float16 if quantization.half_scales else torch.float32
    counts = squares if quantization.weighs_errors_of(how) else None
    return choose_scales(weight, how, quantization.scales, dtype, quantization.signed, counts)


WAYS = {"nearest codes": nearest, "compensated": compensated}


def squares_of_inputs(decoder: Decoder, rows: Tensor) -> dict[str, Tensor]:
    """Return the mean outer product of the inputs [in, in] of every layer's product, over ``rows`` [rows, ids]."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1])) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    hooks = [
        module.register_forward_pre_hook(lambda module, given, name=f"{name}.weight": note(name, given[0]))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    ]
    for part in (rows[first : first + ROWS_OF_A_PASS] for first in range(0, len(rows), ROWS_OF_A_PASS)):
        modality = torch.from_numpy(modality_of_ids(part.numpy(), decoder.config))
        start, wanted = torch.zeros(len(part), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode():
            decoder(part, modality, start, wanted, modality[0, :1], decoder.new_cache(*part.shape))
    for hook in hooks:
        hook.remove()
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


def losses_by_way(bundle: Path, checkpoint: Path, data: Path) -> dict[str, dict[str, float]]:
    """Return the mean KL, in nats, by way of quantizing, and by predicted modality.

    Raises:
        InputError: for a bundle that is not quantized in symmetric whole numbers.
        CheckpointError: for another checkpoint than it was made of.
    """
    opened, source = open_bundle(bundle), open_checkpoint(checkpoint)
    config, how = opened.config, opened.manifest.quantization
    if how is None or any(one.how.stored == "fp8" or not one.how.symmetric for one in how.coded_weights(parameters(config))):
        raise InputError(
            f"{bundle} holds weights without codes, with zero points or in fp8: export it with --precision int4 or int8"
        )
    if source.sha256() != opened.manifest.source["sha256"]:
        raise CheckpointError(f"{bundle} was not made of {checkpoint} (its hash differs): name the right one with --checkpoint")
    _, full = with_head(source.config, source.read, config.head)
    weights = QuantizedWeights(opened.model_path, config, how)
    with TorchSession(Decoder.from_tensors(config, full, torch.float32)) as session:
        expected = expected_of(session, read_token_file(data, config))
        rows = {
            "sampled at once": sample_rows(StreamedDecoder(config, full, torch.float32)),
            "sampled token by token": torch.from_numpy(np.stack(sampled_rows(session, *TOKEN_BY_TOKEN))),
        }
        squares = {name: squares_of_inputs(session.decoder, one) for name, one in rows.items()}

    def lost(read: Mapping[str, Tensor]) -> dict[str, float]:
        decoder = Decoder.from_tensors(config, lambda name: read[name] if name in read else weights.read(name), torch.float32)
        with TorchSession(decoder) as session:
            return {modality: loss.kl_mean for modality, loss in losses_of(session, expected).items()}

    formats, found = _formats(config, how), {"the bundle": lost({})}
    asked = [(sampled, way) for sampled in squares for way in WAYS]
    for sampled, way in track(asked, "quantizing", console=Console(stderr=True)):
        chosen = {name: one for name, one in squares[sampled].items() if name in formats}
        made = {name: WAYS[way](full(name).float(), formats[name], one, how) for name, one in chosen.items()}
        found[f"{way}, {sampled}"] = lost(made)
    return found


def _formats(config: ModelConfig, how: Quantization) -> dict[str, WeightFormat]:
    """Return the format of every layer's coded weight, by name."""
    told = {one.name: how.format_of(one) for one in parameters(config) if one.name.startswith("layers.")}
    return {name: one for name, one in told.items() if one is not None and one.is_coded}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="What the bundle was made of.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Lines of ids; 2048 positions are read.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, checkpoint: Path, data: Path, threads: int, json_file: Path | None) -> None:
    """Measure, then one JSON document last."""
    torch.set_num_threads(threads)
    try:
        found = losses_by_way(bundle, checkpoint, data)
    except MotrtError as wrong:
        raise click.ClickException(str(wrong)) from None
    rows = [(name, *(f"{value:.4f}" for value in one.values())) for name, one in found.items()]
    Console(stderr=True).print(
        table(f"{bundle}: mean KL, nats", ["codes", *(f"{name}>" for name in found["the bundle"])], rows)
    )
    leave({"machine": machine("motrt", "torch"), "bundle": bundle.name, "mean_kl": found}, json_file)


if __name__ == "__main__":
    main()

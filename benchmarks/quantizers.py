"""What quantisation costs a trained model: perplexity and bits of a weight, of our bundles and of onnxruntime's own quantiser.

    .venv/bin/motrt export model int4 --precision int4
    .venv/bin/python benchmarks/quantizers.py --checkpoint model --tokens text.jsonl --bundle int4 \
        --other "onnxruntime RTN, blocks of 32" --json benchmarks/results/quantizers.json

Everything is computed by the PyTorch decoder, in float32, from what the codes stand for, so only weights differ. A row that
says ``activations of 8 bits`` rounds them before products as a CPU's fast kernels do. Sequences are lines of JSON, as for
``motrt verify``. onnxruntime's quantiser is given attention and experts, each weight in a graph of its own; the table and the
head are the int8 ones of the first bundle, so that they cost the same in every row. The last line is one JSON document.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from torch import Tensor

from motrt.benchmarks.document import leave, machine
from motrt.export.parity.rounded_activations import RoundingDecoder
from motrt.export.parity.token_file import read_token_file
from motrt.export.quantized_weights import QuantizedWeights
from motrt.model_def.checkpoint.native import Checkpoint, open_checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.head_surgery import with_head
from motrt.model_def.parameters import Parameter, parameters
from motrt.model_def.quantization import stored_bytes_of
from motrt.runtime.bundle import Bundle, open_bundle
from motrt.runtime.step_inputs import modality_of_ids

SCALE_BITS = 32  # as wide as the activations: that is what the operator takes

# Name -> block size, whether it has zero points, and what makes the quantiser's configuration.
OTHERS: dict[str, tuple[int, bool, Callable[[int, bool], Any]]] = {
    f"onnxruntime {name}, blocks of {block}": (block, has_zero_points, make)
    for block in (64, 32)
    for name, has_zero_points, make in (
        ("RTN", False, lambda block, zero: nbits.DefaultWeightOnlyQuantConfig(block, not zero, accuracy_level=1)),
        (
            "RTN with zero points",
            True,
            lambda block, zero: nbits.DefaultWeightOnlyQuantConfig(block, not zero, accuracy_level=1),
        ),
        ("HQQ", True, lambda block, zero: nbits.HQQWeightOnlyQuantConfig(block)),
        ("k-quant", True, lambda block, zero: nbits.KQuantWeightOnlyQuantConfig()),
    )
}


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    name: str
    perplexity: dict[str, float]
    bits: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        told = {name: round(value, 3) for name, value in self.perplexity.items()}
        return {"name": self.name, "perplexity": told, "bits": round(self.bits, 3), "seconds": round(self.seconds, 1)}


def perplexity(decoder: Decoder, sequences: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    """Of each predicted modality: the exponential of the mean surprise at the next id."""
    config = decoder.config
    surprises: dict[str, list[Tensor]] = {name: [] for name in config.modality_names}
    for ids in sequences:
        modality = torch.from_numpy(modality_of_ids(ids, config))
        row, count = torch.from_numpy(ids)[None], len(ids) - 1
        with torch.inference_mode():
            logits, _ = decoder(
                row, modality[None], torch.zeros(1, dtype=torch.int64), torch.arange(count), modality[1:],
                decoder.new_cache(1, len(ids)),
            )  # fmt: skip
        told = -logits.log_softmax(1).gather(1, row[0, 1:, None])[:, 0]
        for number, name in enumerate(config.modality_names):
            surprises[name].append(told[modality[1:] == number])
    joined = {name: torch.cat(values) for name, values in surprises.items()}
    return {name: exp(float(values.mean())) for name, values in joined.items() if len(values)}


def bits_of(config: ModelConfig, num_bytes: int, checkpoint: Checkpoint) -> float:
    """Bits of a parameter of the checkpoint."""
    return 8 * num_bytes / sum(one.numel for one in parameters(checkpoint.config))


def of_bundle(bundle: Bundle, checkpoint: Checkpoint, sequences: Sequence[np.ndarray[Any, Any]], rounds: bool) -> Measured:
    """One of our bundles, its activations as they are or as a CPU rounds them."""
    config, how = bundle.config, bundle.manifest.quantization
    assert how is not None
    started = time.perf_counter()
    weights = QuantizedWeights(bundle.model_path, config, how)
    decoder = RoundingDecoder.from_tensors(config, weights.read, torch.float32)
    assert isinstance(decoder, RoundingDecoder)
    decoder.round_before(how.activation_blocks(config) if rounds else {})
    found = perplexity(decoder, sequences)
    name = f"{bundle.path.name}{', activations of 8 bits' if rounds else ''}"
    return Measured(name, found, bits_of(config, stored_bytes_of(config, how, 4), checkpoint), time.perf_counter() - started)


def of_onnxruntime(name: str, checkpoint: Checkpoint, first: Bundle, sequences: Sequence[np.ndarray[Any, Any]]) -> Measured:
    """Attention and experts as onnxruntime's quantiser has them."""
    block, has_zero_points, make = OTHERS[name]
    config, how = first.config, first.manifest.quantization
    assert how is not None
    started, plain = time.perf_counter(), with_head(checkpoint.config, checkpoint.read, first.config.head)[1]
    held = QuantizedWeights(first.model_path, config, how)
    table = {one.name: one for one in parameters(config)}

    def read(weight: str) -> Tensor:
        one = table[weight]
        if len(one.shape) == 1:
            return plain(weight)
        return through_onnxruntime(plain(weight), block, has_zero_points, make) if is_given(one) else held.read(weight)

    found = perplexity(Decoder.from_tensors(config, read), sequences)
    num_bits = 4 + (SCALE_BITS + (4 if has_zero_points else 0)) / block
    given = [one for one in table.values() if is_given(one)]
    others = [one for one in table.values() if not is_given(one)]
    num_bytes = sum(one.numel for one in given) * num_bits / 8 + stored_bytes_of(config, how, 4, others)
    return Measured(name, found, bits_of(config, int(num_bytes), checkpoint), time.perf_counter() - started)


def is_given(one: Parameter) -> bool:
    return len(one.shape) == 2 and one.part in ("attention", "expert")


def through_onnxruntime(weight: Tensor, block: int, has_zero_points: bool, make: Callable[[int, bool], Any]) -> Tensor:
    """What its codes of ``weight`` [out, in] stand for: its product with a matrix of ones on the diagonal."""
    values = np.ascontiguousarray(weight.float().numpy().T)
    width, out = values.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    quantiser = nbits.MatMulNBitsQuantizer(
        model, block_size=block, is_symmetric=not has_zero_points, accuracy_level=1, algo_config=make(block, has_zero_points)
    )
    quantiser.process()
    made = quantiser.model.model
    assert [node.op_type for node in made.graph.node] == ["MatMulNBits"], "it quantised nothing"
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    turned_back = session.run(None, {"x": np.eye(width, dtype=np.float32)})[0]
    return torch.from_numpy(np.ascontiguousarray(turned_back.T))


def table_of(rows: Sequence[Measured]) -> str:
    """Lines of Markdown."""
    names = list(rows[0].perplexity)
    lines = ["| weights | bits of a weight | " + " | ".join(f"perplexity, {name}" for name in names) + " |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for one in rows:
        told = " | ".join(f"{one.perplexity[name]:.2f}" for name in names)
        lines.append(f"| {one.name} | {one.bits:.2f} | {told} |")
    return "\n".join(lines)


@click.command()
@click.option("--checkpoint", "folder", type=click.Path(path_type=Path), required=True, help="A native checkpoint.")
@click.option("--tokens", type=click.Path(path_type=Path), required=True, help="JSON lines of ids.")
@click.option("--bundle", "folders", type=click.Path(path_type=Path), multiple=True, required=True, help="Exported of it.")
@click.option("--other", "others", type=click.Choice(list(OTHERS)), multiple=True, help="A way of onnxruntime's quantiser.")
@click.option("--ours/--no-ours", default=True, show_default=True, help="The bundles; without, the first gives table and head.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the result here.")
def main(
    folder: Path,
    tokens: Path,
    folders: tuple[Path, ...],
    others: tuple[str, ...],
    ours: bool,
    threads: int,
    json_file: Path | None,
) -> None:
    torch.set_num_threads(threads)
    for name in (nbits.__name__, "neural_compressor"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every weight
    checkpoint = open_checkpoint(folder)
    sequences = read_token_file(tokens, checkpoint.config)
    bundles = [open_bundle(one) for one in folders]
    started = time.perf_counter()
    full = perplexity(Decoder.from_tensors(checkpoint.config, checkpoint.read), sequences)
    rows = [Measured("fp32", full, 32.0, time.perf_counter() - started)]
    for bundle in bundles if ours else ():
        for rounds in (False, True):
            rows.append(of_bundle(bundle, checkpoint, sequences, rounds))
            click.echo(rows[-1].to_dict())
    for name in others:
        rows.append(of_onnxruntime(name, checkpoint, bundles[0], sequences))
        click.echo(rows[-1].to_dict())
    click.echo(table_of(rows))
    told = {"machine": machine(), "tokens": sum(map(len, sequences)), "rows": [one.to_dict() for one in rows]}
    leave(told, json_file)


if __name__ == "__main__":
    main()

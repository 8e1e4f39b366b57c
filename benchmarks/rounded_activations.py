"""What rounding activations to 8 bits loses of a quantised model, and before which products.

    .venv/bin/python benchmarks/rounded_activations.py BUNDLE --data text.jsonl [--json FILE]

A CPU's fast kernels round activations before products with codes, the weights' blocks under one scale. Here PyTorch does so
before some of the products, and the mean KL divergence from the same codes with activations as they are is what that loses.
Read it beside what the codes lose themselves (``motrt verify``): activations that lose a small part of that need no precision
of their own.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track

from motrt.benchmarks.document import leave, machine
from motrt.errors import InputError, MotrtError
from motrt.export.parity.quantization_loss import deployed_decoder, expected_of, losses_of
from motrt.export.parity.token_file import read_token_file
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.report import table
from motrt.runtime.bundle import open_bundle
from motrt.runtime.torch_session import TorchSession


def choices(blocks: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield a name and the products that are rounded before: all, all in smaller blocks, each kind, each layer."""
    yield "all", dict(blocks)
    for block in (32, 16):
        yield f"all, in blocks of {block}", {name: min(block, own) for name, own in blocks.items()}
    for kind in sorted({kind_of(name) for name in blocks}):
        yield kind, {name: block for name, block in blocks.items() if kind_of(name) == kind}
    for layer in sorted({int(name.split(".")[1]) for name in blocks if name.startswith("layers.")}):
        yield f"layer {layer}", {name: block for name, block in blocks.items() if name.startswith(f"layers.{layer}.")}


def kind_of(name: str) -> str:
    """Return which matrix of a layer a weight is, with its route, or that it is a head."""
    return name.split(".", 2)[2].removesuffix(".weight") if name.startswith("layers.") else "head"


def losses_by_product(bundle: Path, data: Path) -> dict[str, dict[str, float]]:
    """Return the mean KL, in nats, by what is rounded before, and by predicted modality."""
    opened = open_bundle(bundle)
    config, how = opened.config, opened.manifest.quantization
    if how is None or not (blocks := how.activation_blocks(config)):
        raise InputError(f"{bundle} has no products that round their activations: export it with --precision int8 or int4")
    weights = QuantizedWeights(opened.model_path, config, how)
    with TorchSession(deployed_decoder(config, weights.read, {})) as session:
        expected = expected_of(session, read_token_file(data, config))
    found = {}
    for name, chosen in track(list(choices(blocks)), "asking", console=Console(stderr=True)):
        with TorchSession(deployed_decoder(config, weights.read, chosen)) as session:
            found[name] = {modality: loss.kl_mean for modality, loss in losses_of(session, expected).items()}
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Lines of ids; 2048 positions are read.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, data: Path, threads: int, json_file: Path | None) -> None:
    """Measure, then one JSON document last."""
    torch.set_num_threads(threads)
    try:
        found = losses_by_product(bundle, data)
    except MotrtError as wrong:
        raise click.ClickException(str(wrong)) from None
    rows = [(name, *(f"{value:.5f}" for value in one.values())) for name, one in found.items()]
    columns = ["rounded before", *(f"{name}>" for name in found["all"])]
    Console(stderr=True).print(table(f"{bundle}: mean KL of 8-bit activations, nats", columns, rows))
    leave({"machine": machine("motrt", "torch"), "bundle": bundle.name, "mean_kl": found}, json_file)


if __name__ == "__main__":
    main()

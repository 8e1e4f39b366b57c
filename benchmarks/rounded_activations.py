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
from motrt.export.parity.quantization_loss import deployed_decoder, expected_of, losses_of
from motrt.export.parity.token_file import read_token_file
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.report import table
from motrt.model_def.parameters import SHARED_HEAD
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
    return "head" if name == SHARED_HEAD or not name.startswith("layers.") else name.split(".", 2)[2].removesuffix(".weight")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Lines of ids; 2048 positions are read.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(bundle: Path, data: Path, threads: int, json_file: Path | None) -> None:
    """Measure, then one JSON document last."""
    torch.set_num_threads(threads)
    opened = open_bundle(bundle)
    config, how = opened.config, opened.manifest.quantization
    if how is None or not (blocks := how.activation_blocks(config)):
        raise click.ClickException(f"{bundle} has no products that round their activations: export it with --precision int8")
    weights = QuantizedWeights(opened.model_path, config, how)
    with TorchSession(deployed_decoder(config, weights.read, {})) as session:
        expected = expected_of(session, read_token_file(data, config))
    console, found = Console(stderr=True), {}
    for name, chosen in track(list(choices(blocks)), "asking", console=console):
        with TorchSession(deployed_decoder(config, weights.read, chosen)) as session:
            found[name] = {modality: loss.kl_mean for modality, loss in losses_of(session, expected).items()}
    rows = [(name, *(f"{value:.5f}" for value in one.values())) for name, one in found.items()]
    columns = ["rounded before", *(f"{name}>" for name in found["all"])]
    console.print(table(f"{bundle}: mean KL of 8-bit activations, nats", columns, rows))
    leave({"machine": machine("motrt", "torch"), "bundle": bundle.name, "mean_kl": found}, json_file)


if __name__ == "__main__":
    main()

"""P1: do module, ONNX file and session agree on names, dtypes, dims, and on every weight, bit for bit?"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from motrt.export.onnx_check import (
    attribute_problems,
    census_problems,
    contract_problems,
    dequantize_problems,
    location_problems,
    routing_problems,
    weight_problems,
)
from motrt.export.onnx_from_module import ROPE_TABLES
from motrt.export.parity.findings import Finding, judged
from motrt.export.quantized_weights import QuantizedWeights
from motrt.export.steps import Advance
from motrt.export.stored_weights import read_graph, stored_bytes
from motrt.model_def.checkpoint.container import TORCH_DTYPES
from motrt.model_def.checkpoint.native import Checkpoint
from motrt.model_def.config import ModelConfig
from motrt.model_def.decoder import Decoder
from motrt.model_def.graph import CANONICAL
from motrt.model_def.head_surgery import with_head
from motrt.model_def.operators import rope_tables
from motrt.model_def.parameters import parameters
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import Signature

RUNG = "P1"
MOST_NAMED = 5


def contract_findings(
    model_file: Path,
    config: ModelConfig,
    dtype: str,
    checkpoint: Checkpoint,
    advance: Advance,
    quantization: Quantization | None = None,
) -> list[Finding]:
    """Ask P1 of ``model_file``; ``advance`` is told the bytes of each weight compared."""
    model = read_graph(model_file)
    plain = _weights_finding(model, model_file.parent, config, dtype, checkpoint, advance, quantization)
    findings = [
        judged(RUNG, "module has the parameters of its configuration", _module_problems(config)),
        judged(RUNG, "graph keeps the contract", contract_problems(model, Signature.canonical(config, dtype))),
        judged(RUNG, "every weight is in the graph and read", weight_problems(model, config, dtype, CANONICAL, quantization)),
        judged(
            RUNG,
            "operators are standard and as many as the model has parts",
            census_problems(model, config, CANONICAL, quantization),
        ),
        judged(RUNG, "operators carry the model's numbers", attribute_problems(model, config)),
        judged(RUNG, "routed weights multiply their own rows alone", routing_problems(model, config, CANONICAL, quantization)),
        judged(RUNG, "external data are one file", location_problems(model)),
        judged(
            RUNG, "rotary tables are the configuration's, bit for bit", _rope_problems(model, model_file.parent, config, dtype)
        ),
        plain,
    ]
    if quantization is not None:
        turned = dequantize_problems(model, config, CANONICAL, quantization)
        findings.append(judged(RUNG, "codes are turned back by their own scales", turned))
        findings.append(_codes_finding(QuantizedWeights(model_file, config, quantization), config, checkpoint, advance))
    return findings


def _module_problems(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in Decoder(config).state_dict().items()}
    expected = {parameter.name: parameter.shape for parameter in parameters(config)}
    return [f"{name}: {state.get(name)} against {expected.get(name)}" for name in state.keys() | expected.keys()
            if state.get(name) != expected.get(name)]  # fmt: skip


def _rope_problems(model: onnx.ModelProto, folder: Path, config: ModelConfig, dtype: str) -> list[str]:
    """Every position's row: the scenarios of the higher rungs reach the first few only."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    tables = rope_tables(config.rope, config.head_size, config.max_seq_len, TORCH_DTYPES[dtype])
    return [
        f"{name} is {'another' if name in stored else 'missing'}"
        for name, table in zip(ROPE_TABLES, tables, strict=True)
        if name not in stored or not np.array_equal(_bytes(table), stored_bytes(stored[name], folder))
    ]


def _weights_finding(
    model: onnx.ModelProto,
    folder: Path,
    config: ModelConfig,
    dtype: str,
    checkpoint: Checkpoint,
    advance: Advance,
    quantization: Quantization | None,
) -> Finding:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    _, read = with_head(checkpoint.config, checkpoint.read, config.head)
    different, compared = [], 0
    for parameter in parameters(config):
        if quantization is not None and quantization.format_of(parameter) is not None:
            continue
        expected = _bytes(read(parameter.name).to(TORCH_DTYPES[dtype]))
        tensor = stored.get(parameter.name)
        if tensor is None or not np.array_equal(expected, stored_bytes(tensor, folder)):
            different.append(parameter.name)
        compared += 1
        advance(expected.nbytes)
    problems = [f"{len(different)} of {compared} differ: {', '.join(different[:MOST_NAMED])}"] if different else []
    which = "every weight" if quantization is None else "every weight that is not quantised"
    return judged(RUNG, f"{which} equals the checkpoint's, bit for bit", problems, weights=compared)


def _codes_finding(weights: QuantizedWeights, config: ModelConfig, checkpoint: Checkpoint, advance: Advance) -> Finding:
    _, read = with_head(checkpoint.config, checkpoint.read, config.head)
    answers = [(name, weights.half_problem(name, read)) for name in weights.halves]
    for one in weights.coded:
        answers.append((one.name, weights.problem(one, read)))
        advance(one.shape[0] * one.shape[1])
    problems = [f"{name}: {problem}" for name, problem in answers if problem]
    told = [f"{len(problems)} of {len(answers)} differ: {'; '.join(problems[:MOST_NAMED])}"] if problems else []
    return judged(RUNG, "every code is the nearest to the checkpoint's weight", told, weights=len(answers))


def _bytes(value: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return value.contiguous().view(-1).view(torch.uint8).numpy()

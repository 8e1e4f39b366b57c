"""The ladder for graphs that were derived of the canonical one: each is climbed beside it, and must do what it is there for.

A derived graph is never alone: what it does not serve (a step knows no prompts) goes through the canonical graph, as it does
in a session. So every scenario mixes both over one cache, which proves that they write and read it alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import TensorProto

from motrt.export.onnx_check import (
    attribute_problems,
    census_problems,
    contract_problems,
    dequantize_problems,
    location_problems,
    weight_problems,
)
from motrt.export.parity.consistency import consistency_findings
from motrt.export.parity.contract import RUNG
from motrt.export.parity.findings import Finding, judged
from motrt.export.parity.row_noise import RowLimits
from motrt.export.parity.scenarios import Scenario, pattern_scenarios
from motrt.export.stored_weights import data_place, read_graph
from motrt.model_def.config import ModelConfig
from motrt.model_def.graph import Graph
from motrt.model_def.quantization import Quantization
from motrt.model_def.signature import Signature
from motrt.runtime.session import Session
from motrt.runtime.step_inputs import modality_of_ids


def derived_contract_findings(
    canonical_file: Path, graph: Graph, config: ModelConfig, dtype: str, quantization: Quantization | None = None
) -> list[Finding]:
    """P1 of one derived graph, which lies beside the canonical one."""
    model = read_graph(canonical_file.parent / graph.file_name)
    canonical = read_graph(canonical_file)
    return [
        judged(RUNG, "graph keeps the contract", contract_problems(model, Signature.of(graph, config, dtype))),
        judged(
            RUNG,
            "its weights and no others are in the graph and read",
            weight_problems(model, config, dtype, graph, quantization),
        ),
        judged(RUNG, "operators are as many as its parts", census_problems(model, config, graph, quantization)),
        judged(RUNG, "codes are turned back by their own scales", dequantize_problems(model, config, graph, quantization)),
        judged(RUNG, "operators carry the model's numbers", attribute_problems(model, config)),
        judged(RUNG, "external data are one file", location_problems(model)),
        judged(RUNG, "its weights are the canonical graph's very bytes", _place_problems(model, canonical)),
    ]


def _place_problems(model: onnx.ModelProto, canonical: onnx.ModelProto) -> list[str]:
    """What lies in the data file must be what the canonical graph finds there under the same name."""
    places = {one.name: data_place(one) for one in canonical.graph.initializer if _is_external(one)}
    return [
        f"{one.name} lies elsewhere"
        for one in model.graph.initializer
        if _is_external(one) and places.get(one.name) != data_place(one)
    ]


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def own_consistency_findings(session: Session, graph: Graph, limits: RowLimits | None = None) -> list[Finding]:
    """P2 of a step, over sequences in which it does the decode steps; of other graphs, over all modalities mixed."""
    if graph.tokens is None or graph.predicts is None:
        return consistency_findings(session, limits)
    pattern = [graph.tokens] if graph.tokens == graph.predicts else [graph.tokens, graph.predicts]
    row, batch = pattern_scenarios(session.config, pattern)
    return consistency_findings(session, limits, row, batch)


def served(graph: Graph, scenarios: Sequence[Scenario], config: ModelConfig) -> list[Scenario]:
    """Those scenarios in which ``graph`` does a pass."""
    return [one for one in scenarios if not graph.is_step or _has_step_of(graph, one, config)]


def _has_step_of(graph: Graph, scenario: Scenario, config: ModelConfig) -> bool:
    modalities = [modality_of_ids(row, config) for row in scenario.rows]
    return any(
        all(
            (row[start + step], row[start + step + 1]) == (graph.tokens, graph.predicts)
            for row, start in zip(modalities, scenario.num_prompt, strict=True)
        )
        for step in range(scenario.num_steps)
    )


def use_finding(num_passes: int) -> Finding:
    """A graph that no pass went through was not examined at all."""
    problems = [] if num_passes else ["no pass went through it: nothing above says anything of it"]
    return judged("P4", "it did the passes that it is there for", problems, positions=num_passes)


def named_for(graph: Graph, findings: Sequence[Finding]) -> list[Finding]:
    """The same findings, saying which graph they are of."""
    return [replace(one, graph=graph.name) for one in findings]

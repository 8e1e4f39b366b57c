"""The trace: PyTorch's second one is left out, and comes back where it is needed."""

import re
from collections import Counter
from contextlib import nullcontext
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript import rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

from motrt.errors import ExportError
from motrt.export import onnx_from_module
from motrt.export.onnx_from_module import trace
from motrt.model_def.graph import CANONICAL, Graph, plan_for
from motrt.tests.export.models import THREE, TIED, TINY

SMALL = TINY.replace(num_layers=1)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("config", "dtype", "graph"),
    [
        (SMALL, "float16", CANONICAL),
        (TIED.replace(num_layers=1), "float32", CANONICAL),
        (SMALL, "float32", plan_for("tensorrt", SMALL)[0]),
    ],
    ids=["split head", "tied head", "a step"],
)
def test_a_second_trace_would_give_the_same_operators(
    config: Any, dtype: str, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = torch.export.ExportedProgram.run_decompositions

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(1)
        return real(self, *arguments, **named)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    once = trace(config, dtype, graph)
    assert not asked
    monkeypatch.setattr(onnx_from_module, "_traced_once", nullcontext)
    assert operators(trace(config, dtype, graph)) == operators(once)
    assert asked


@pytest.mark.parametrize(
    ("config", "graph"),
    [(THREE.replace(num_layers=1), CANONICAL), (TIED.replace(num_layers=1), plan_for("tensorrt", TIED)[-1])],
    ids=["three modalities", "a prefill that selects"],
)
def test_the_rule_that_is_left_out_would_change_nothing(config: Any, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = rewriter.rewrite, []

    def both(model: ir.Model, rules: Any) -> None:
        other = model.clone()
        real(other)
        assert real(model, rules) is model and written(model) == written(other)
        asked.append(rules)

    monkeypatch.setattr(rewriter, "rewrite", both)
    trace(config, "float32", graph)
    assert len(asked) == 2 and all(slice_split_rule not in one and len(one) > 40 for one in asked)


def written(model: ir.Model) -> list[str]:
    """Each node, what it reads by who made that, and its attributes; values that the rewriter makes are numbered."""
    numbered = re.compile("name='val_[0-9]+'")
    return [
        f"{node.op_type} {[made_by(value) for value in node.inputs]} {numbered.sub('', str(node.attributes))}"
        for node in model.graph
    ]


def made_by(value: ir.Value | None) -> str | None:
    maker = None if value is None else value.producer()
    if maker is not None:
        return maker.op_type
    return None if value is None else value.name


def test_what_the_exporter_does_not_know_as_it_is_is_traced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    known = operators(trace(SMALL, "float16"))
    monkeypatch.setattr("motrt.model_def.heads.cast", lambda x, dtype: x.to(dtype))
    before = torch.export.ExportedProgram.run_decompositions
    assert operators(trace(SMALL, "float16")) == known
    assert torch.export.ExportedProgram.run_decompositions is before


def test_what_can_not_be_traced_either_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **named: Any) -> Any:
        raise torch.onnx.errors.OnnxExporterError("planted")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ExportError, match=r"could not trace the decoder \(model\): planted"):
        trace(SMALL, "float32")

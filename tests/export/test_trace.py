"""The trace: PyTorch's second one is left out, and comes back where it is needed."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import onnx_ir as ir
import pytest
import torch

from motrt.errors import ExportError
from motrt.export import onnx_from_module
from motrt.export.onnx_from_module import trace
from motrt.model_def.graph import CANONICAL, Graph, plan_for
from motrt.tests.export.models import TIED, TINY

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
def test_a_second_trace_and_every_rule_of_the_rewriter_would_give_the_same_operators(
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
    monkeypatch.setattr(onnx_from_module, "REWRITES", None)  # the rewriter's own
    assert operators(trace(config, dtype, graph)) == operators(once)
    assert asked


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

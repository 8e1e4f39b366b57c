"""The feed-forward experts. Both kinds take and give hidden states of the model's width; neither gives tokens."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from motrt.model_def.config import AdapterExpert, Expert, SwigluExpert
from motrt.model_def.routing import Routing


class Swiglu(nn.Module):
    """``w2(silu(w1 x) * w3 x)``. Shapes: [rows, m] -> [rows, m]."""

    def __init__(self, expert: SwigluExpert, model_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(model_width, expert.hidden_size, bias=expert.bias)
        self.w2 = nn.Linear(expert.hidden_size, model_width, bias=expert.bias)
        self.w3 = nn.Linear(model_width, expert.hidden_size, bias=expert.bias)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return gated


class Adapter(nn.Module):
    """``up_proj(fc2(gelu(fc1(down_proj x))))``, exact GELU. Shapes: [rows, m] -> [rows, m]."""

    def __init__(self, expert: AdapterExpert, model_width: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(model_width, expert.width, bias=False)
        self.fc1 = nn.Linear(expert.width, expert.hidden_size, bias=expert.bias)
        self.fc2 = nn.Linear(expert.hidden_size, expert.width, bias=expert.bias)
        self.up_proj = nn.Linear(expert.width, model_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        lifted: Tensor = self.up_proj(self.fc2(F.gelu(self.fc1(self.down_proj(x)))))
        return lifted


def build_expert(expert: Expert, model_width: int) -> nn.Module:
    return Adapter(expert, model_width) if isinstance(expert, AdapterExpert) else Swiglu(expert, model_width)


class RoutedExperts(nn.ModuleDict):
    """One expert per modality: every row goes through its own modality's. Shapes: [T, m] -> [T, m]."""

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        experts = list(self.values())
        return routing.combine({route: experts[route](rows) for route, rows in routing.dispatch(x).items()})

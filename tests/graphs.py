"""What tests of torch.compile share: a backend that records, and torch's own warnings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

# torch's compiler and fast path warn of what they do themselves, on models without this package too.
TORCH_NOTICES = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


class Recorder:
    """A backend that keeps each graph and runs it as it is: outputs are those of eager execution bit for bit."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def code(self) -> str:
        return str(self.graphs[-1].code)


def start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graphs yet, and eager execution drops out as the compiled one does, where it would draw faster bits."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr("lightning_lora.nn.lora_layer.drop", lambda x, p: (F.dropout(x, p), 1.0))

"""The fast path of nn.TransformerEncoderLayer, which reads every weight in evaluation mode.

It is turned off while an adapter inside is unmerged, and on again when merged, where it reads W'.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .adapted_weights import adapted_layers

# Attributes that each module asks before it takes its fast path, and for nothing else. torch.compile guards on them;
# on a forward hook, the other way to keep a layer off its fast path, it does not.
SWITCHES: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",  # the layers' slow path rejects nested tensors
}


def update_fast_paths(modules: Iterable[nn.Module]) -> None:
    """Allow the fast paths of torch's transformer layers just where no unmerged adapter is inside. In place.

    Args:
        modules: all of a model's.
    """
    for module in modules:
        for kind, switch in SWITCHES.items():
            if isinstance(module, kind):
                active = any(layer.lora_active for layer in adapted_layers(module).values())
                before = f"lora_{switch}"  # what the switch was before it was turned off
                if active:
                    if before not in vars(module):
                        setattr(module, before, getattr(module, switch, False))
                    setattr(module, switch, False)
                elif before in vars(module):
                    setattr(module, switch, vars(module)[before])
                    delattr(module, before)

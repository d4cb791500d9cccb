"""How B @ A lies in a weight: built whole only where a layer must."""

from __future__ import annotations

import pytest

from lightning_lora.nn.lora_layer import LoRALayer
from support.models.layers import CASES, make_subject


def test_only_where_it_must_a_layer_builds_the_whole_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is in classes with their own forward, and where convolving with the factors would cost more."""
    calls: list[str] = []
    delta = LoRALayer.delta
    monkeypatch.setattr(LoRALayer, "delta", lambda *args: calls.append("delta") or delta(*args))
    whole = set()
    for name in CASES:
        calls.clear()
        subject = make_subject(name)
        subject.model(subject.x)
        if calls:
            whole.add(name)
    own = {"activated linear", "conv that pads", "conv with an inner forward"}
    cheaper = {"conv2d, depthwise", "conv2d, depthwise twice"}
    assert {name.removeprefix("dora, ") for name in whole} == own | cheaper | {"embedding, by frequency"}

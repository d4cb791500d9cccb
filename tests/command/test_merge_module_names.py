"""Merging into bases whose files use other names than the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_lora import LoRAError, load_adapter, save_merged
from lightning_lora.command.merge import merge_on_disk
from support.notices import TORCH_NOTICES, quiet_peers
from support.pretrained import assert_loads_as, base_and_adapter, dinov2, gemma3, llava, vit

pytestmark = [*quiet_peers, *TORCH_NOTICES, pytest.mark.transformers_5]  # older ones store modules' names

FAMILIES: dict[str, Callable[[], Any]] = {"vit": vit, "llava": llava, "gemma3": gemma3, "dinov2": dinov2}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_with_other_names_than_the_modules_is_refused_with_a_remedy_that_works(tmp_path, family: str):
    network = base_and_adapter(tmp_path, FAMILIES[family])
    with pytest.raises(LoRAError, match=r"other names in their files.*use load_adapter and save_merged"):
        merge_on_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = type(network).from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    save_merged(again, tmp_path / "out")
    assert_loads_as(tmp_path / "out", network)

"""lightning-lora merge: the output for a folder is a folder. The name of a file is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora import LoRAError
from lightning_lora.command.merge import merge_on_disk
from support.notices import quiet_peers
from support.peers import base_folder, ours

pytestmark = quiet_peers


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.bin", "merged.pt", "merged.ckpt"])
def test_the_name_of_a_file_for_a_folder_is_refused_and_nothing_is_written(tmp_path: Path, name: str):
    base = base_folder("llama", tmp_path / "base")
    ours("llama", tmp_path / "adapter")
    with pytest.raises(
        LoRAError, match=rf"a folder, and '{name}' is the name of a file; give a folder's name, as 'merged'"
    ):
        merge_on_disk(base, tmp_path / "adapter", tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    merge_on_disk(base, tmp_path / "adapter", tmp_path / "merged-1.5")
    assert list((tmp_path / "merged-1.5").glob("*.safetensors"))

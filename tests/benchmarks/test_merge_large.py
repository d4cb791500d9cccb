"""The large merge of merge_large.py at a fortieth of its size: memory, values, and a model that loads."""

from __future__ import annotations

import merge_large
import pytest

pytestmark = pytest.mark.slow


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Beside what the imports take, a merge needs the adapter and some chunks of 4 to 8 MB, not 200 MB."""
    found = merge_large.measure(tmp_path / "run", 0.2, width=1024, rounds=1)
    assert found["base_bytes"] > 200e6
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    more = found["peak_bytes"] - found["peak_of_the_imports_alone"]
    print(f"peak {found['peak_bytes'] / 1e6:.0f} MB, {more / 1e6:.0f} over the imports; adapter {adapter / 1e6:.0f} MB")
    assert more < 2 * adapter + 80e6  # jsonargparse and the chunks
    assert found["peak_bytes"] < 1e9
    assert found["elements"] > 50_000
    assert found["not_nearest"] <= 1e-4 * found["elements"]
    assert found["worst_in_last_places"] < 0.501

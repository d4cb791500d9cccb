"""load_adapter onto a sharded model that has an adapter: one of the same rank is swapped in, another rank refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_lora import LoRAConfig, LoRAError, is_merged, load_adapter, merge, save_adapter, take_adapter
from lightning_lora.distributed.sharding import holds_shards, is_fully_sharded, is_sharded
from support.ranks.processes import world
from support.ranks.sharded import X, shard_, whole_state
from support.ranks.sharded_adapters import assert_same_bits, injected


def swapped(path: Path) -> None:
    net = shard_(injected(seed=1))
    for module in filter(is_fully_sharded, net.modules()):
        module.unshard()
    assert not any(map(is_sharded, net.parameters()))  # gathered at the moment
    assert any(map(holds_shards, net.modules()))
    net = shard_(injected(seed=1))
    whole = whole_state(net)
    taken = take_adapter(net)
    load_adapter(net, path / "same")
    assert_same_bits(taken.tensors, {name: whole[name] for name in taken.tensors})
    load_adapter(net, taken)
    assert_same_bits(whole_state(net), whole)
    for merged in (False, True):
        merge(net) if merged else None
        load_adapter(net, path / "same")
        assert is_merged(net) == merged
        alone = injected(seed=1)
        load_adapter(alone, path / "same")
        assert_same_bits(whole_state(net), alone.state_dict())
        merge(alone) if merged else None
        torch.testing.assert_close(net(X), alone(X), rtol=1e-5, atol=1e-6)
        before = whole_state(net)
        with pytest.raises(LoRAError, match=r"is sharded, and has rank 3, the adapter 5: load it before"):
            load_adapter(net, path / "other")
        assert is_merged(net) == merged
        assert_same_bits(whole_state(net), before)


@pytest.mark.slow
def test_equal_ranks_are_swapped_and_others_refused(tmp_path: Path):
    for name, rank in (("same", 3), ("other", 5)):
        net = injected(seed=1, config=LoRAConfig(r=rank, lora_alpha=2))
        with torch.no_grad():
            for key, parameter in net.named_parameters():
                if "lora_" in key:
                    parameter.mul_(-2)
        save_adapter(net, tmp_path / name)
    world().run(swapped, tmp_path)

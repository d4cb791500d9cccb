"""summary of a sharded model: whole counts, this rank's memory, and no rank waits for another."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from lightning_lora import LoRAConfig, inject, summary
from lightning_lora.report.summary import Memory, Summary
from support.ranks.processes import world
from support.ranks.sharded import network, shard_

CONFIG = LoRAConfig(r=2, target_modules=["0", "2"], modules_to_save=["4"])


def sharded_on_rank_zero_alone() -> tuple[Summary, Memory] | None:
    inject(net := network(), CONFIG)
    shard_(net)
    if dist.get_rank():
        return None
    sizes = {name: parameter.to_local().nbytes for name, parameter in net.named_parameters()}
    adapter = sum(size for name, size in sizes.items() if "lora_" in name)
    trained = sum(sizes[name] for name, parameter in net.named_parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in net.buffers())
    return summary(net), Memory(sum(sizes.values()) - adapter + buffers, adapter, trained, 2 * trained)


def test_summary_of_a_sharded_model_counts_whole_tensors_and_this_ranks_memory():
    inject(net := network(), CONFIG)
    whole = summary(net)
    (found, memory), nothing = world().run(sharded_on_rank_zero_alone)
    assert nothing is None
    assert found == replace(whole, memory=memory)
    assert memory.total < 0.6 * whole.memory.total

"""Flat slices of a weight: cut into matrices, merged and restored in place, and put together over ranks."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_lora import LoRAConfig, inject, is_merged, merge, merged_state_dict, unmerge
from lightning_lora.distributed import sharding
from lightning_lora.distributed.flat import FlatShard, mark_as_flat, pieces, unsharded_shape
from lightning_lora.distributed.sharding import (
    copies_of,
    copy_,
    full_tensor,
    local,
    rows_of,
    samples_of_all,
    windows,
)
from lightning_lora.errors import NonFiniteError
from lightning_lora.nn.exact_merge import Buffers, merge_weight_, merged_weight, restored_weight, unmerge_weight_
from lightning_lora.nn.low_rank import LowRankBlock, crop_to_window
from support.covering import covering
from support.models.networks import fingerprint
from support.ranks.processes import world
from support.ranks.sharded_adapters import assert_same_bits
from support.runs.recorders import Traffic

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 7), (7, 1), (5, 3), (37, 41), (128, 33)]


def cuts(numel: int, ranks: int) -> list[tuple[int, int]]:
    """Equal slices as of DeepSpeed, of which the last may be shorter or empty, and slices of any length as of FSDP1."""
    size = -(-numel // ranks)
    equal = [(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(ranks)]
    places = sorted(random.randint(0, numel) for _ in range(ranks - 1))
    return [*equal, *zip([0, *places], [*places, numel], strict=True)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_of_any_cut_are_at_most_three_matrices_that_hold_each_element_once(shape):
    height, width = shape
    numbers = torch.arange(height * width)
    for ranks in (1, 2, 3, 5, 64):
        for start, stop in cuts(height * width, ranks):
            found = pieces(start, stop, width)
            assert len(found) <= 3
            parts = [numbers.view(shape)[rows, columns].flatten() for rows, columns in found]
            assert torch.equal(torch.cat([numbers[:0], *parts]), numbers[start:stop])


def blocks_of(shape: tuple[int, int], *, kind: str, generator: torch.Generator) -> list[LowRankBlock]:
    """A change of the whole weight, of its rows or its columns in two parts, with or without a scale."""
    height, width = shape
    parts = {
        "whole": [(0, height, 0, width)],
        "rows": [(0, height // 3, 0, width), (height // 2, height - height // 2, 0, width)],
        "columns": [(0, height, width // 2, width - width // 2)],
    }
    blocks = []
    for row, rows, column, columns in parts[kind.partition(" ")[0]]:
        left, right = (torch.randn(*size, generator=generator) for size in ((rows, 3), (3, columns)))
        size = (1, columns) if "transposed" in kind else (rows, 1)
        scale = torch.rand(size, generator=generator) + 0.5 if "scale" in kind else None
        blocks.append(LowRankBlock(row, column, left, right, scale))
    return blocks


@pytest.mark.parametrize(
    ("copy", "dtype", "kind"),
    covering([False, True], DTYPES, ["whole", "rows", "columns", "whole scale", "whole scale transposed"]),
)
def test_slices_of_any_cut_are_merged_as_the_whole_weight_and_restored_in_every_bit(kind, dtype, copy):
    random.seed(3)
    generator = torch.Generator().manual_seed(3)
    for shape in SHAPES:
        weight = torch.randn(shape, generator=generator).to(dtype)
        blocks = blocks_of(shape, kind=kind, generator=generator)
        expected = merged_weight(weight, blocks, 0.01).flatten()
        for start, stop in cuts(weight.numel(), random.choice([1, 2, 3, 5])):
            memory = torch.cat([weight.new_full((3,), 7.0), weight.flatten()[start:stop], weight.new_full((2,), 7.0)])
            own, before = memory[3:-2], memory.clone()
            mark_as_flat(
                flat := torch.empty(0),
                lambda own=own, start=start, shape=shape: FlatShard(own, start, shape, None, CPU),
            )
            parts = windows(flat, shape[1])
            cropped = [block for part in parts for block in crop_to_window(blocks, part)]
            record = merge_weight_(own, cropped, 0.01, copies=Buffers() if copy else None)
            torch.testing.assert_close(own, expected[start:stop])  # another order of summing may round otherwise
            assert torch.equal(bits(restored_weight(own, record)), bits(weight.flatten()[start:stop]))
            assert torch.equal(memory[:3], before[:3])
            assert torch.equal(memory[-2:], before[-2:])
            unmerge_weight_(own, record)
            assert torch.equal(bits(memory), bits(before))


def flat_layer(start: int, stop: int, build: type[nn.Module] = nn.Linear) -> nn.Module:
    """An adapted layer of which this rank has a slice, as ZeRO-3 leaves it: empty, the slice beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(build(6, 5) if build is nn.Linear else build(6, 4, 3))
    inject(model, LoRAConfig(r=2, init_lora_weights=False, target_modules=["0"]))
    weight = model[0].weight
    values = weight.detach().flatten()[start:stop].clone()
    shard = FlatShard(values, start, weight.shape, None, CPU)
    mark_as_flat(weight, lambda: shard)
    weight.data = weight.data.new_empty(0)
    return model[0]


@pytest.mark.parametrize(("build", "numel"), [(nn.Linear, 30), (nn.Conv1d, 72)])
def test_adapted_layer_merges_into_its_slice_and_shows_what_was_there(build, numel):
    torch.manual_seed(0)
    whole = nn.Sequential(build(6, 5) if build is nn.Linear else build(6, 4, 3))
    base = whole[0].weight.detach().flatten().clone()
    inject(whole, LoRAConfig(r=2, init_lora_weights=False, target_modules=["0"]))
    whole[0].merge_(copy=False)
    for start, stop in cuts(numel, 2):
        layer = flat_layer(start, stop, build)
        slice_ = local(layer.weight)
        layer.merge_(copy=False)
        torch.testing.assert_close(slice_, whole[0].weight.detach().flatten()[start:stop])
        assert_same_bits({"W": local(layer.original())}, {"W": base[start:stop]})
        assert unsharded_shape(layer.original()) == whole[0].weight.shape
        layer.unmerge_()
        assert_same_bits({"W": slice_}, {"W": base[start:stop]})


# --- on two ranks ---

WEIGHTS = {  # name of the layer in the network: how its weight is divided over two ranks
    "0": (0, 20, 42),
    "2": (0, 24, 42),
    "4": (0, 0, 24),  # all of it on the second rank
}


def divide_(net: nn.Sequential) -> dict[str, torch.Tensor]:
    """Divide the weights of a network over two ranks, and return this rank's slices. In place."""
    slices = {}
    for name, places in WEIGHTS.items():
        weight = net.get_submodule(name).weight
        start, stop = places[dist.get_rank()], places[dist.get_rank() + 1]
        slices[name] = weight.detach().flatten()[start:stop].clone()
        shard = FlatShard(slices[name], start, weight.shape, dist.group.WORLD, CPU)
        mark_as_flat(weight, lambda shard=shard: shard)
        weight.data = weight.data.new_empty(0)
    return slices


def plain_net(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4))
    if options:
        inject(net, LoRAConfig(**{"r": 2, "init_lora_weights": False} | options))
    return net


def assert_gathered(dtype: torch.dtype) -> None:
    """What is gathered has the bits of the slices, and no more is sent than they are."""
    values = torch.tensor([[-0.0, math.nan, 1.5], [math.inf, 2.0, -3.0]], dtype=dtype)
    for place in (0, 2, 6):  # all of it lies on one rank, or a part on each
        own = values.flatten()[:place] if dist.get_rank() == 0 else values.flatten()[place:]
        shard = FlatShard(own.clone(), place * dist.get_rank(), values.shape, dist.group.WORLD, CPU)
        mark_as_flat(own, lambda shard=shard: shard)
        with Traffic() as traffic:
            assert torch.equal(bits(full_tensor(own)), bits(values))
        assert traffic.bytes("broadcast") == values.nbytes
        assert traffic.bytes() - traffic.bytes("broadcast", "allgather") == 0


def exchanged() -> None:
    for dtype in DTYPES:
        assert_gathered(dtype)
    whole = plain_net()
    divide_(net := plain_net())
    for name in WEIGHTS:
        flat, plain = net.get_submodule(name).weight, whole.get_submodule(name).weight
        assert_same_bits({"W": full_tensor(flat)}, {"W": plain.detach()})
        assert_same_bits({"rows": rows_of(flat, [2, 0])}, {"rows": plain.detach()[[2, 0]]})
        assert samples_of_all([(flat, (0, 5, 20))]) == samples_of_all([(plain, (0, 5, 20))])
        kept = copies_of({"W": flat})["W"]
        copy_(flat, torch.ones(plain.shape))
        copy_(target := torch.zeros(plain.shape), flat)
        assert torch.equal(target, torch.ones(plain.shape))
        copy_(flat, kept)
        assert_same_bits({"W": full_tensor(flat)}, {"W": plain.detach()})


def test_values_of_slices_are_gathered_read_and_copied_as_those_of_the_whole():
    world().run(exchanged)


def merged_on_ranks(**more: object) -> None:
    options = {"target_modules": ["0", "2", "4"], **more}
    expected = merged_state_dict(plain_net(**options))
    slices = divide_(net := plain_net(**options))
    before = {name: values.clone() for name, values in slices.items()}
    gathered: list[tuple[int, ...]] = []
    own, sharding.gather = (
        sharding.gather,
        lambda tensor: gathered.append(tuple(unsharded_shape(tensor))) or own(tensor),
    )
    try:
        known = fingerprint(net)
        merge(net)
        for name, places in WEIGHTS.items():
            part = slice(places[dist.get_rank()], places[dist.get_rank() + 1])
            torch.testing.assert_close(slices[name], expected[f"{name}.weight"].flatten()[part])
        assert fingerprint(net) == known  # of the base
        unmerge(net)
        assert gathered == []
    finally:
        sharding.gather = own
    assert_same_bits(slices, before)
    found = merged_state_dict(net)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert known == fingerprint(plain_net(**options))


def merged_by_each_variant() -> None:
    merged_on_ranks()
    merged_on_ranks(use_dora=True)


def test_model_merges_into_its_slices_and_is_known_without_gathering_a_weight():
    world().run(merged_by_each_variant)


def refused_on_ranks() -> list[str]:
    slices = divide_(net := plain_net(target_modules=["0", "2", "4"]))
    if dist.get_rank() == 1:
        slices["2"][0] = math.inf
    before = {name: values.clone() for name, values in slices.items()}
    with pytest.raises(NonFiniteError) as caught:
        merge(net)
    assert not is_merged(net)
    assert_same_bits(slices, before)
    return [str(caught.value)]


def test_slice_that_is_not_finite_on_one_rank_is_an_error_on_all_and_nothing_is_merged():
    (other,), (own,) = world().run(refused_on_ranks)
    assert own.startswith("merge: layer '2': W + s * B @ A is not finite")
    assert other == "merge: layer '2': this failed on another rank, whose message says why."

"""The metrics of merging equal a computation by hand, over several ranks too."""

from __future__ import annotations

import pytest
import torch

from lightning_lora.metrics import MergeError


def test_merge_error_over_ranks_equals_that_of_all_outputs():
    """The largest of the ranks' largest, and the relative error of all outputs together: as of one rank with all."""
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 5, generator=generator) * scale for scale in (1.0, 10.0)]
    others = [out + 0.1 * torch.randn(out.shape, generator=generator) for out in outputs]
    ranks, one = [MergeError(), MergeError()], MergeError()
    for rank, out, other in zip(ranks, outputs, others, strict=True):
        rank.update(other, out)
        one.update(other, out)
    reduced = MergeError()
    for name, reduce in reduced._reductions.items():  # what Metric.sync does with the gathered states
        setattr(reduced, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    reduced._update_count = 1
    assert reduced.compute() == pytest.approx({k: v.item() for k, v in one.compute().items()})
    difference = torch.cat(others) - torch.cat(outputs)
    assert reduced.compute()["max"].item() == pytest.approx(difference.abs().max().item())
    assert reduced.compute()["relative"].item() == pytest.approx((difference.norm() / torch.cat(outputs).norm()).item())

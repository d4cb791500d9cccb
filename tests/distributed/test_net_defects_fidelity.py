"""What rounding costs, where a part of the model is sharded and the rest is on every rank."""

from __future__ import annotations

from test_net_fidelity_sharded import adapted, reports, sharded_reports
from world import world


def test_the_16_bit_report_counts_a_layer_that_is_whole_on_every_rank_once():
    assert world().run(sharded_reports, "one layer", 0.01) == [reports(adapted(0.01))] * 2

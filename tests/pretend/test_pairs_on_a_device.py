"""The table of pairs once more, with models and batches on a device that is not the CPU."""

from __future__ import annotations

import pytest
from test_pairs import COLUMN_OF, NO_PAIR, PAIRS, ROW_OF, outcome, page_outcomes

from support.notices import tiny_layers
from support.pairs import placed
from support.pretend_device import CAN_PRETEND, pretend_device

pytestmark = [
    tiny_layers,
    pytest.mark.skipif(not CAN_PRETEND, reason="this torch takes no device in Python"),
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
]
ON_A_DEVICE = [(row, column) for row, column in PAIRS if not ROW_OF[row].quantised]  # no kernels for packed weights


@pytest.mark.parametrize(("variant", "condition"), ON_A_DEVICE)
def test_a_pair_gives_the_outcome_in_the_page(variant: str, condition: str):
    with pretend_device() as device, placed(device):
        assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == page_outcomes()[variant, condition] != NO_PAIR

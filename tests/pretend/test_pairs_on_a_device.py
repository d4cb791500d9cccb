"""Each variant and each condition of the table of pairs, with models and batches on a device that is not the CPU."""

from __future__ import annotations

import pytest

from support.covering import covering
from support.devices import Place
from support.pairs import placed
from tables.test_pairs import COLUMN_OF, NO_PAIR, ROW_OF, outcome, page_outcomes

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
]
ROWS = [row for row, variant in ROW_OF.items() if not variant.quantised]  # there are no kernels for packed weights


@pytest.mark.parametrize(("variant", "condition"), covering(ROWS, [*COLUMN_OF], meet=1))
def test_a_pair_gives_the_outcome_in_the_page(variant: str, condition: str, a_device: Place):
    with a_device() as device, placed(device):
        assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == page_outcomes()[variant, condition] != NO_PAIR

"""The table of pairs once more, with models and batches on a device that is not the CPU."""

from __future__ import annotations

import pytest

from support.devices import Place
from support.pairs import placed
from test_pairs import COLUMN_OF, NO_PAIR, PAIRS, ROW_OF, outcome, page_outcomes

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
]
ROWS = ("LoRA", "DoRA", "PiSSA", "EVA", "rows", "parameters", "LoHa", "most of it at once")
COLUMNS = (  # what a device meets
    *("bfloat16", "autocast", "cast while merged", "start", "steps", "W unfrozen", "base edited", "lora_dropout"),
    *("adapter", "merged, while merged", "full", "PEFT folder", "swap, merged", "taken while merged", "deepcopy"),
    *("pickle", "merge, unmerge", "inference_mode", "disable_adapter", "unload", "merge_and_unload"),
)


def every_day(row: str, column: str) -> bool:
    return row in ROWS and column in COLUMNS


ON_A_DEVICE = [
    pytest.param(row, column, marks=() if every_day(row, column) else pytest.mark.slow)
    for row, column in PAIRS
    if not ROW_OF[row].quantised  # there are no kernels for packed weights
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "condition"), ON_A_DEVICE)
def test_a_pair_gives_the_outcome_in_the_page(variant: str, condition: str, a_device: Place):
    with a_device() as device, placed(device):
        assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == page_outcomes()[variant, condition] != NO_PAIR

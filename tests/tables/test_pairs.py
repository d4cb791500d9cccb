"""The table of pairs: each variant of LoRA with each precision, option, change and way to keep it, on a small model.

A pair is run, and its outcome compared with tests/pairs.md: right, or refused with how the message begins.
LORA_FULL=1 in the environment runs all of them, WRITE_TABLE=1 writes that page. Rows of what is not installed stay.
What is right is said by pair_checks.py in support/models, by what pairs.py there computes in float64 from the
definitions.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lightning_lora import LoRAError
from support.covering import covering
from support.devices.places import Place
from support.models.attached_adapters import attached_first, beside, trained_with
from support.models.pair_checks import (
    another_base,
    averaged,
    by_pickle,
    cast_later,
    changed_by_hand,
    copied,
    disabled,
    dropout,
    frozen_again,
    inference,
    merge_cycles,
    merged_for_good,
    patterns,
    precision,
    resume,
    start,
    swap,
    taken,
    through_folder,
    training,
    under_autocast,
    unfreezing,
    unfrozen_in_half,
    unloaded,
)
from support.models.pairs import Variant, placed

pytestmark = [
    pytest.mark.filterwarnings("ignore:lightning_lora. merged 16-bit weights. rounding costs"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]
PAGE = Path(__file__).parents[1] / "pairs.md"
HOW_TO_WRITE = "write the page with WRITE_TABLE=1 pytest -n 0 tests/tables/test_pairs.py (the whole file, without -k)"
QKV = {"enable_lora": {"inner": [True, False, True]}}
ROWS = {"target_modules": ["inner"], "trainable_token_indices": {"embed": [1, 4, 9]}}
OF_BOTH = {"target_modules": ["inner"], "trainable_token_indices": {"embed": [1, 4, 9], "head": [0, 3]}}
PARAMETERS = {"target_modules": [], "target_parameters": ["stack.weights", "head.weight"]}

VARIANTS = [
    Variant("LoRA"),
    Variant("rsLoRA", {"use_rslora": True}),
    Variant("DoRA", {"use_dora": True}),
    Variant("PiSSA", {"init_lora_weights": "pissa"}),
    Variant("PiSSA, by iteration", {"init_lora_weights": "pissa_niter_8"}),
    Variant("OLoRA", {"init_lora_weights": "olora"}),
    Variant("EVA", {"init_lora_weights": "eva"}),
    Variant("LoRA-GA", {"init_lora_weights": "lora_ga"}),
    Variant("orthogonal", {"init_lora_weights": "orthogonal"}),
    Variant("gaussian", {"init_lora_weights": "gaussian"}),
    Variant("A and B random", {"init_lora_weights": False}),
    Variant("DoRA, EVA", {"use_dora": True, "init_lora_weights": "eva"}),
    Variant("rows", ROWS, ("inner",)),
    Variant("rows of table and head", OF_BOTH, ("inner",)),
    Variant("rows, DoRA", ROWS | {"use_dora": True}, ("inner",)),
    Variant("parameters", PARAMETERS, ("stack.weights", "head.weight")),
    Variant("parameters, PiSSA", PARAMETERS | {"init_lora_weights": "pissa"}, ("stack.weights", "head.weight")),
    Variant("modules_to_save", {"modules_to_save": ["other"]}),
    Variant('bias="all"', {"bias": "all"}),
    Variant('bias="lora_only"', {"bias": "lora_only", "use_dora": True}),
    Variant("enable_lora", QKV),
    Variant("enable_lora, PiSSA", QKV | {"init_lora_weights": "pissa"}),
    Variant("LoRA+", lr_ratio=4),
    Variant("LoHa", {"variant": "loha"}),
    Variant(
        "most of it at once",
        OF_BOTH
        | {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian"}
        | {"modules_to_save": ["other"], "bias": "all"},
        ("inner",),
    ),
    Variant("nf4", quantized="nf4"),
    Variant("int8", quantized="int8"),
]


@dataclass(frozen=True)
class Condition:
    """What a variant meets.

    Attributes:
        check: raises where the pair is not right.
        meaning: what it checks, for the page.
        with_quantized: whether there are such pairs with packed weights.
    """

    table: str
    label: str
    check: Callable[[Variant], None]
    meaning: str
    with_quantized: bool = True


PRECISION, TRAINING, CHECKPOINTS = "Precision", "Training", "Checkpoints"
FOLDERS, MERGING, BESIDE = "Folders, swaps and copies", "Merging and taking out", "Beside attached adapters"
CONDITIONS = [
    Condition(PRECISION, "float32", precision(torch.float32), "outputs, gradients, W' and a step in float32"),
    Condition(PRECISION, "float64", precision(torch.float64), "the same in float64, to twelve digits"),
    Condition(PRECISION, "bfloat16", precision(torch.bfloat16), "weights in bfloat16, factors in float32"),
    Condition(PRECISION, "bfloat16 factors", precision(torch.bfloat16, keep=False), "`autocast_adapter_dtype=False`"),
    Condition(PRECISION, "float16", precision(torch.float16), "weights in float16, factors in float32"),
    Condition(PRECISION, "float16 factors", precision(torch.float16, keep=False), "`autocast_adapter_dtype=False`"),
    Condition(PRECISION, "autocast", under_autocast, "to bfloat16; merging under it writes what it writes outside"),
    Condition(PRECISION, "cast while merged", cast_later, "a merged model is cast to bfloat16, then unmerged"),
    Condition(
        PRECISION,
        "W unfrozen, bfloat16",
        unfrozen_in_half,
        "the user trains an adapted weight in bfloat16",
        with_quantized=False,
    ),
    Condition(TRAINING, "start", start, "A and B begin as defined, W' as W, and torch's random stream stands still"),
    Condition(TRAINING, "steps", training, "four steps of SGD; then everything is saved, and taken out again"),
    Condition(TRAINING, "patterns", patterns, "`rank_pattern` and `alpha_pattern`, trained, merged and loaded"),
    Condition(
        TRAINING,
        "W unfrozen",
        unfreezing("W"),
        "the user trains an adapted weight from the first step on; it is saved, and goes back when the adapter does",
        with_quantized=False,
    ),
    Condition(TRAINING, "W unfrozen later", unfreezing("W", after=2), "from the third step on", with_quantized=False),
    Condition(TRAINING, "W frozen again", frozen_again, "after two steps, for two more", with_quantized=False),
    Condition(TRAINING, "other weight unfrozen", unfreezing("embed.weight", after=2), "the table, from the third step"),
    Condition(TRAINING, "biases unfrozen", unfreezing("inner.bias", "other.bias", after=1), "from the second step"),
    Condition(TRAINING, "base edited", changed_by_hand, "weights are changed in place", with_quantized=False),
    Condition(
        TRAINING,
        "another base",
        another_base,
        "load_state_dict with another base, before and after training",
        with_quantized=False,
    ),
    Condition(TRAINING, "lora_dropout", dropout, "acts in training alone"),
    Condition(TRAINING, "average", averaged, "LoRAWeightAveraging over four steps, merged; then the bits come back"),
    Condition(
        CHECKPOINTS, "adapter", resume("adapter"), "an adapter checkpoint: two steps more are the uninterrupted ones"
    ),
    Condition(CHECKPOINTS, "merged", resume("merged"), "the same from a merged one, which a plain model loads too"),
    Condition(CHECKPOINTS, "full", resume("full"), "the same from a full one, on another base", with_quantized=False),
    Condition(
        CHECKPOINTS, "state_dict", resume("state"), "the same from the model's own state dict", with_quantized=False
    ),
    *(
        Condition(
            CHECKPOINTS,
            f"{kind}, W unfrozen",
            resume(kind, unfrozen=True),
            "the same where the user trains an adapted weight",
            with_quantized=False,
        )
        for kind in ("adapter", "merged", "full")
    ),
    *(
        Condition(
            CHECKPOINTS,
            f"{kind}, while merged",
            resume(kind, merged=True),
            "the same with merged models",
            with_quantized=kind != "full",
        )
        for kind in ("adapter", "merged", "full")
    ),
    Condition(FOLDERS, "PEFT folder", through_folder(), "save_adapter and load_adapter, onto a plain model"),
    Condition(
        FOLDERS, "PEFT folder, patterns", through_folder(with_patterns=True), "the same with other ranks and alphas"
    ),
    Condition(FOLDERS, "swap", swap(), "load_adapter of another rank and alpha, and back"),
    Condition(FOLDERS, "swap, merged", swap(merged=True), "the same with a merged model"),
    Condition(
        FOLDERS,
        "swap, W unfrozen",
        swap(unfrozen=True),
        "the same, the other adapter with an adapted weight that the user trained",
        with_quantized=False,
    ),
    Condition(FOLDERS, "taken", taken(), "take_adapter, then training, then load_adapter: every bit comes back"),
    Condition(FOLDERS, "taken while merged", taken(merged=True), "the same with a merged model"),
    Condition(FOLDERS, "deepcopy", copied(copy.deepcopy), "of a merged model; both train on"),
    Condition(FOLDERS, "pickle", copied(by_pickle), "the same"),
    Condition(MERGING, "merge, unmerge", merge_cycles, "three cycles, training in between; state dicts hold W"),
    Condition(MERGING, "inference_mode", inference, "around answers and merging; unmerged, trained and merged outside"),
    Condition(
        MERGING, "disable_adapter", disabled, "merged and not: the plain model's bits inside, the old ones after"
    ),
    Condition(MERGING, "unload", unloaded, "bits, classes and requires_grad of the plain model"),
    Condition(MERGING, "merge_and_unload", merged_for_good, "plain weights W', as in merged_state_dict"),
    Condition(BESIDE, "two more, float32", beside(torch.float32), "outputs, gradients, W', every strength; detached"),
    Condition(BESIDE, "two more, bfloat16", beside(torch.bfloat16), "the same in bfloat16"),
    Condition(BESIDE, "steps with two more", trained_with, "four steps of SGD, a swap and back, and an unload"),
    Condition(BESIDE, "attached first", attached_first, "to the plain model, which is merged; then load_adapter"),
]


ROW_OF = {variant.label: variant for variant in VARIANTS}
COLUMN_OF = {condition.label: condition for condition in CONDITIONS}
NO_PAIR = "-"
# Each other variant is one of these with another start, or with an option of "most of it at once".
DIFFERENT = ["LoRA", "DoRA", "PiSSA", "rows", "parameters", "enable_lora", "LoHa", "most of it at once", "nf4", "int8"]
PAIRS = [
    (variant.label, condition.label)
    for condition in CONDITIONS
    for variant in VARIANTS
    if not variant.quantized
    or (condition.with_quantized and (variant.quantized, condition.label) != ("nf4", "float64"))
]
OTHERS = [variant.label for variant in VARIANTS if variant.label not in DIFFERENT]
TRIED = [
    *covering(DIFFERENT, [*COLUMN_OF], fits=lambda *pair: pair in PAIRS),
    *covering(OTHERS, ["float32", "start", "steps"], fits=lambda *pair: pair in PAIRS),
    *covering(OTHERS, [column for column in COLUMN_OF if column not in ("float32", "start", "steps")], meet=1),
]
HEAD = """# Pairs of features

<!-- written by tests/tables/test_pairs.py -->

Each variant of LoRA (a row) meets each precision, change and way to keep it (a column), on a small model. Tests compare
this page with what they see: every day in some pairs, and with `LORA_FULL=1` in all.

"right" means what [the check of the column](support/models/pair_checks.py) asks for, by [a few lines in
float64](support/models/pairs.py): outputs, gradients, W' rounded once, and every bit where bits must come back.
"refused" shows how the error begins. "-" stands where there is no such pair: nf4 has no float64, and packed weights
have no gradient.
"""


def outcome(variant: Variant, condition: Condition) -> str:
    """Return right, or refused with how the error begins; anything else is a failure of the pair."""
    try:
        condition.check(variant)
    except LoRAError as error:
        return f"refused: {' '.join(str(error).split()[:8])} ..."
    return "right"


def render(outcomes: dict[tuple[str, str], str]) -> str:
    """Return the page: a table for each group of conditions, one line for each condition and what it means."""
    parts = [HEAD]
    for table in dict.fromkeys(condition.table for condition in CONDITIONS):
        columns = [condition for condition in CONDITIONS if condition.table == table]
        lines = [f"## {table}", ""]
        lines += [f"- **{condition.label}**: {condition.meaning}" for condition in columns]
        lines += [
            "",
            f"| | {' | '.join(condition.label for condition in columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for row in VARIANTS:
            cells = [outcomes.get((row.label, column.label), NO_PAIR) for column in columns]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


@functools.cache
def page_outcomes() -> dict[tuple[str, str], str]:
    """Return what the page says of each pair."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        columns, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
        for label, *cells in rows:
            found |= {(label, column): cell for column, cell in zip(columns, cells, strict=True) if cell != NO_PAIR}
    return found


def test_the_page_has_all_pairs():
    if os.environ.get("WRITE_TABLE"):
        outcomes = page_outcomes() if PAGE.exists() else {}
        for row, column in PAIRS:
            try:
                outcomes[row, column] = outcome(ROW_OF[row], COLUMN_OF[column])
            except pytest.skip.Exception:  # of a package that is not installed
                continue
        PAGE.write_text(render({pair: outcomes[pair] for pair in PAIRS}))
        page_outcomes.cache_clear()
    assert PAGE.read_text() == render(page_outcomes()), HOW_TO_WRITE
    assert page_outcomes().keys() == set(PAIRS), HOW_TO_WRITE


@pytest.mark.parametrize(("variant", "condition"), TRIED)
def test_a_pair_gives_the_outcome_in_the_page(variant: str, condition: str, compiling_device: str):
    said = page_outcomes().get((variant, condition))
    assert said, f"{PAGE.name} has no pair of {variant!r} and {condition!r}; {HOW_TO_WRITE}"
    with placed(compiling_device):
        assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == said


PLAIN = [row for row, variant in ROW_OF.items() if not variant.quantized]  # no pretended device has packed weights


@pytest.mark.parametrize(("variant", "condition"), covering(PLAIN, [*COLUMN_OF], meet=1))
def test_a_pair_on_a_device_gives_the_outcome_in_the_page(variant: str, condition: str, a_device: Place):
    with a_device() as device, placed(device):
        assert outcome(ROW_OF[variant], COLUMN_OF[condition]) == page_outcomes()[variant, condition] != NO_PAIR

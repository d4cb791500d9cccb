"""A Trainer's life under Lightning's other name: tests of all rooms, run with `pytorch_lightning` alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning

from support.runs.notices import UNTRAINED_NOTICE
from support.runs.other_name import under_pytorch_lightning

pytestmark = pytest.mark.usefixtures("as_program")

pytestmark = [UNTRAINED_NOTICE, pytest.mark.filterwarnings("ignore:The dirpath has changed from")]

LIVES = {
    "test_callback": [
        "test_adapts_and_trains_layers_wherever_they_are_built",
        "test_inject_inside_configure_model_is_seen",
    ],
    "test_cli": [
        "test_every_option_from_the_lora_block",
        "test_cli_fits_from_yaml",
    ],
    "formats/test_lightning_checkpoint": [
        "test_checkpoint_of_each_kind_holds_the_right_tensors_and_is_read",
        "test_copy_of_the_module_saves_and_loads_by_itself",
    ],
    "trainer/test_cli_optimizer": [
        "test_run_equals_that_of_the_same_optimizer_made_in_configure_optimizers",
    ],
    "trainer/test_evaluation_interrupted": [
        "test_a_fault_in_evaluation_leaves_the_model_unmerged_and_the_next_fit_right",
        "test_ctrl_c_while_the_trainer_merges_leaves_the_model_unmerged",
    ],
    "trainer/test_setup": [
        "test_disable_adapter_and_unload_after_fits_give_a_fresh_model_wherever_its_layers_were_built",
    ],
    "trainer/test_evaluation_loops": [
        "test_two_live_trainers_in_turn_equal_the_unmerged_run",
    ],
    "trainer/test_evaluation": [
        "test_merged_exactly_during_evaluation_batches",
        "test_layers_built_anew_in_each_stage_are_adapted_anew",
    ],
    "trainer/test_checkpoint_options": ["test_checkpoint_is_found_however_the_trainer_is_told"],
    "trainer/test_checkpoint_hooks_resume": ["test_run_resumed_with_another_kind_equals_the_uninterrupted_one"],
    "trainer/test_checkpoint_hooks": ["test_checkpoint_saved_on_an_exception_equals_that_of_the_unmerged_run"],
    "test_monitor_statistics": [
        "test_csv_columns_have_the_numbers_of_every_nth_step",
    ],
    "test_averaging": ["test_resumed_run_equals_the_uninterrupted_one"],
    "trainer/test_compatibility_weight_averaging": ["test_validation_sees_the_averaged_adapter"],
}
SLOW = {  # they take longest; hooks and stages have shorter ones above
    "test_cli_fits_from_yaml",
    "test_checkpoint_of_each_kind_holds_the_right_tensors_and_is_read",
    "test_run_equals_that_of_the_same_optimizer_made_in_configure_optimizers",
    "test_a_fault_in_evaluation_leaves_the_model_unmerged_and_the_next_fit_right",
    "test_disable_adapter_and_unload_after_fits_give_a_fresh_model_wherever_its_layers_were_built",
    "test_checkpoint_is_found_however_the_trainer_is_told",
    "test_run_resumed_with_another_kind_equals_the_uninterrupted_one",
    "test_checkpoint_saved_on_an_exception_equals_that_of_the_unmerged_run",
    "test_validation_sees_the_averaged_adapter",
    "test_resumed_run_equals_the_uninterrupted_one",
}
HERE = Path(__file__)
MODULES = {
    file: under_pytorch_lightning(HERE.parents[1] / f"{file}.py", f"{file.replace('/', '_')}_{HERE.stem}")
    for file in LIVES
}
for file, names in LIVES.items():
    for name in names:
        life = vars(MODULES[file])[name]
        if file == "test_cli":  # which writes its configuration into the present folder
            life = pytest.mark.usefixtures("as_program")(life)
        globals()[name] = pytest.mark.slow(life) if name in SLOW else life


def test_what_is_slow_is_among_the_lives():
    assert {name for names in LIVES.values() for name in names} >= SLOW


def test_nothing_of_the_first_name_is_used_in_a_life_here():
    for module in MODULES.values():
        owners = {getattr(value, "__module__", "") or "" for value in vars(module).values()}
        assert not {owner for owner in owners if owner.split(".")[0] in ("lightning", "support")}
        assert issubclass(vars(module)["Net"], pytorch_lightning.LightningModule)

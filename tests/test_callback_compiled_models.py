"""torch.compile in a Trainer: metrics of the eager fit, only two graphs, checkpoints that load with and without."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.compile import to_uncompiled

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, inject, load_adapter, load_from_checkpoint
from support.runs.notices import TORCH_NOTICES, UNTRAINED_NOTICE
from support.runs.recorders import Recorder, start_anew
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, outputs

pytestmark = TORCH_NOTICES


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    start_anew(monkeypatch)


class Quiet(Net):
    """Logs nothing, because Lightning's log cannot be compiled; the callback below sees what the steps return."""

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


class Watch(L.Callback):
    """Validation losses, and the number of graphs at the end of each epoch, when it also saves a checkpoint."""

    def __init__(self, recorder: Recorder, folder=None) -> None:
        self.recorder, self.folder, self.losses, self.graphs = recorder, folder, [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.losses.append(outputs.detach().clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.graphs.append(len(self.recorder.graphs))
        if self.folder:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def compiled_net(how: str, recorder: Recorder, kind: type[Net] = Quiet, config: LoRAConfig | None = None):
    """Injected before it is compiled where there is a config; else the callback does it, after."""
    model = kind()
    if config is not None:
        inject(model, config)
    if how == "submodule":
        model.body = torch.compile(model.body, backend=recorder, fullgraph=True)
    elif how == "layer":
        model.head = torch.compile(model.head, backend=recorder, fullgraph=True)
    elif how == "in place":
        model.compile(backend=recorder, fullgraph=True)
    return model


TARGETS = ["body.0", "body.3", "head"]
WAYS = ["submodule", "layer", "in place", "whole"]
UNCOMPILED = "not at all"


def fit(path, how: str, *, epochs: int = 3, ckpt_path=None, config: LoRAConfig | None = None, **options):
    torch._dynamo.reset()
    recorder = Recorder()
    torch.manual_seed(0)  # which the factors are drawn from
    model, watch = compiled_net(how, recorder, config=config), Watch(recorder, path)
    lora = LoRACallback(**{"r": 2, "target_modules": TARGETS, **options})
    trainer = make_trainer(path, lora, watch, max_epochs=epochs, num_sanity_val_steps=0 if ckpt_path else 1)
    torch.manual_seed(0)
    whole = torch.compile(model, backend=recorder) if how == "whole" else model
    trainer.fit(whole, Data(), ckpt_path=ckpt_path)
    return model, watch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "options"),
    [(how, {"lora_dropout": 0.5}) for how in WAYS] + [("whole", {"merged_eval": False, "lora_dropout": 0.5})],
)
def test_a_fit_needs_two_graphs_and_equals_the_eager_fit(tmp_path, how, options):
    model, watch = fit(tmp_path, how, **options)
    eager, expected = fit(tmp_path, UNCOMPILED, **options)
    assert watch.graphs == [2, 2, 2]
    assert_same_tensors(watch.losses, expected.losses)
    assert_same_tensors(dict(adapter_state_dict(model)), dict(adapter_state_dict(eager)))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_fit_of_a_model_injected_before_compiling_equals_the_eager_fit(tmp_path):
    config = LoRAConfig(r=2, target_modules=TARGETS, lora_dropout=0.5)
    model, watch = fit(tmp_path, "submodule", config=config, lora_dropout=0.5)
    eager, expected = fit(tmp_path, UNCOMPILED, config=config, lora_dropout=0.5)
    assert watch.graphs == [2, 2, 2]
    assert_same_tensors(watch.losses, expected.losses)
    assert_same_tensors(dict(adapter_state_dict(model)), dict(adapter_state_dict(eager)))


@UNTRAINED_NOTICE
@pytest.mark.parametrize("how", ["in place", "whole"])
def test_validation_runs_the_graph_of_a_model_without_adapters(tmp_path, how):
    codes = []
    for callbacks in ([], [LoRACallback(r=2, target_modules=TARGETS)]):
        torch._dynamo.reset()
        recorder = Recorder()
        model = compiled_net(how, recorder)
        trainer = make_trainer(tmp_path, *callbacks)
        trainer.validate(torch.compile(model, backend=recorder) if how == "whole" else model, Data(), verbose=False)
        assert len(recorder.graphs) == 1
        codes.append(recorder.code())
    assert codes[1] == codes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
def test_compiled_fit_with_an_eval_mode_backbone_needs_no_more_graphs(tmp_path):
    class Frozen(Quiet):
        def prepare(self):
            super().prepare()
            self.body.eval()

    recorder = Recorder()
    model, watch = compiled_net("whole", recorder, Frozen), Watch(recorder)
    lora = LoRACallback(r=2, target_modules=TARGETS, lora_dropout=0.5, merged_eval=False)
    fit_model(tmp_path, torch.compile(model, backend=recorder), lora, watch, max_epochs=3)
    assert watch.graphs == [2, 2, 2]


@pytest.mark.parametrize("how", WAYS)
def test_checkpoint_of_a_model_compiled_in_any_way_has_plain_names(tmp_path, how):
    with torch.compiler.set_stance("force_eager"):
        fit(tmp_path, how, epochs=1)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    assert "_orig_mod" not in repr((saved["state_dict"], saved["lora"], saved["optimizer_states"]))
    factors = {f"{target}.{leaf}" for target in TARGETS for leaf in ("lora_A", "lora_B")}
    assert saved["state_dict"].keys() == factors | {
        f"body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.slow
@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_checkpoint_of_a_compiled_submodule_resumes_and_loads_uncompiled(tmp_path, save):
    model, watch = fit(tmp_path / "compiled", "submodule", save=save)
    eager, _ = fit(tmp_path / "eager", UNCOMPILED, save=save)
    first, last, uncompiled = (tmp_path / name for name in ("compiled/0.ckpt", "compiled/2.ckpt", "eager/2.ckpt"))
    saved, expected = torch.load(last, weights_only=True), torch.load(uncompiled, weights_only=True)
    assert "_orig_mod" not in repr((saved["lora"], saved["optimizer_states"]))
    if save == "adapter":
        assert saved["state_dict"].keys() == expected["state_dict"].keys()
    else:  # the module's own
        plain = {name.replace("body.", "body._orig_mod.") for name in expected["state_dict"]}
        assert saved["state_dict"].keys() == plain
    assert saved["lora"]["layers"] == expected["lora"]["layers"]

    resumed, again = fit(tmp_path / "resumed", "submodule", ckpt_path=first, save=save)
    assert_same_tensors(dict(adapter_state_dict(resumed)), dict(adapter_state_dict(model)))
    assert_same_tensors(again.losses, watch.losses[-len(again.losses) :])

    result = dict(adapter_state_dict(model))
    for source, target in ((last, UNCOMPILED), (uncompiled, "submodule")):
        loaded = compiled_net(target, Recorder())
        load_adapter(loaded, source)
        assert_same_tensors(dict(adapter_state_dict(loaded)), result)
        assert torch.equal(outputs(loaded), outputs(eager))
        crossed, losses = fit(tmp_path / "crossed", target, ckpt_path=source, epochs=4, save=save)
        assert len(losses.losses) == 3
        assert torch.isfinite(outputs(crossed)).all()
    assert torch.equal(outputs(load_from_checkpoint(Quiet, last)), outputs(eager))


def test_a_fit_that_was_compiled_whole_goes_on_uncompiled(tmp_path):
    recorder = Recorder()
    model = Quiet()
    lora = LoRACallback(r=2, target_modules=TARGETS)
    make_trainer(tmp_path, lora, max_epochs=1).fit(torch.compile(model, backend=recorder), Data())
    before = dict(copy.deepcopy(adapter_state_dict(model)))
    to_uncompiled(model)
    make_trainer(tmp_path, lora, max_epochs=1).fit(model, Data())
    assert len(recorder.graphs) == 2
    after = adapter_state_dict(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)

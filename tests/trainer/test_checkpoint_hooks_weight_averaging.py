"""Checkpoints of runs with weight averaging are small and resume, and their metric comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRAError, inject, load_adapter, load_from_checkpoint, merged
from support.covering import covering
from support.runs.lightning_versions import EMAWeightAveraging, averaging, weight_averaging
from support.runs.training import Data, Net, assert_same_tensors, fit_model, make_trainer, tensors, weights
from support.runs.with_callback import SWAPPERS, assert_as_found, base_weights, lora_with_effect, reference_loss, swa

# A fresh Trainer that only tests needs none of them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need",
    "ignore:The dirpath has changed from",
)
BATCHES = "num_batches_tracked"
KINDS = ["adapter", "merged", "full"]
ALL = {**{name: SWAPPERS[name] for name in ("mean", "ema")}, "swa": swa}
NAMES = [*averaging(["mean", "ema"]), "swa"]


def marked(cases: list[Any]) -> list[Any]:
    """Mark cases by their first value, a name in ALL: old versions of Lightning have "swa" alone."""
    return [
        pytest.param(*case.values, id=case.id, marks=[] if case.values[0] == "swa" else weight_averaging)
        for case in cases
    ]


EACH_ONCE = marked(covering([*ALL], KINDS, meet=1))


def fit(path: Path, model: Net, *callbacks: L.Callback, resume: Path | None = None, data: Any = None) -> L.Trainer:
    torch.manual_seed(0)
    keep = ModelCheckpoint(path, "{epoch}", monitor="val_loss", save_top_k=-1)
    return fit_model(path, model, *callbacks, keep, data=data or Data(), ckpt_path=resume, max_epochs=4)


@pytest.mark.parametrize(
    ("name", "kind", "compiled"), marked(covering(["mean", "ema"], ["adapter", "merged"], [False, True], meet=1))
)
def test_checkpoint_with_averaging_holds_no_base_tensor_under_any_key(tmp_path, name: str, kind: str, compiled: bool):
    """The wrapper that torch.compile puts around a submodule renames its tensors. SWA keeps its whole average."""
    model = Net()
    base = {name: value for name, value in base_weights(model).items() if "1." not in name}
    if compiled:
        model.body = torch.compile(model.body, backend="eager")
    own_names = set(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        trainer = fit(tmp_path, model, lora_with_effect(save=kind), ALL[name]())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for file in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        if kind == "merged":
            assert checkpoint["state_dict"].keys() == own_names
            del checkpoint["state_dict"]
        found = list(tensors(checkpoint))
        assert not [path for path, _ in found if path.rpartition("/")[2].replace("_orig_mod.", "") in base]
        for path, tensor in found:
            assert not any(torch.equal(tensor, value) for value in base.values()), path


class CompiledBody(Net):
    def build_body(self) -> None:
        super().build_body()
        self.body = torch.compile(self.body, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), EACH_ONCE)
def test_resumed_run_with_averaging_and_a_compiled_submodule_equals_the_whole(tmp_path, name: str, kind: str):
    """Its wrapper is in the names of "current_model_state" and of the averaged model."""
    models = [CompiledBody(), CompiledBody()]
    with torch.compiler.set_stance("force_eager"):
        for i, model in enumerate(models):
            fit(
                tmp_path / str(i),
                model,
                lora_with_effect(save=kind),
                ALL[name](),
                resume=tmp_path / "0/epoch=2.ckpt" if i else None,
            )
    factors = [{n: v for n, v in weights(model).items() if "lora" in n} for model in models]
    assert len(factors[0]) == 6
    assert_same_tensors(factors[1], factors[0])


@pytest.mark.parametrize(("name", "kind"), EACH_ONCE)
def test_the_best_checkpoint_gives_the_logged_metric(tmp_path, name: str, kind: str):
    trainer = fit(tmp_path, Net(), lora_with_effect(save=kind), ALL[name]())
    keep = trainer.checkpoint_callback
    fresh = make_trainer(tmp_path, lora_with_effect(save=kind))
    found = fresh.test(Net(), Data(), ckpt_path=keep.best_model_path, verbose=False)[0]["test_loss"]
    assert found == pytest.approx(keep.best_model_score.item(), rel=1e-5)
    assert max(keep.best_k_models.values()) - keep.best_model_score > 1e-3  # so that it tells one from another


@weight_averaging
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading")
def test_fresh_trainer_with_the_averaging_callback_gives_the_logged_metric(tmp_path):
    trainer = fit(tmp_path, Net(), lora_with_effect(), ALL["ema"]())
    keep = trainer.checkpoint_callback
    fresh = make_trainer(tmp_path, lora_with_effect(), ALL["ema"]())
    found = fresh.test(Net(), Data(), ckpt_path=keep.best_model_path, verbose=False)[0]["test_loss"]
    assert found == pytest.approx(keep.best_model_score.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), EACH_ONCE)
def test_the_trainer_that_fitted_finds_the_logged_metric_again(tmp_path, name: str, kind: str):
    """Lightning alone does not: WeightAveraging goes back to "current_model_state" whenever it has an average."""
    model = Net()
    trainer = fit(tmp_path, model, lora_with_effect(save=kind), ALL[name]())
    keep = trainer.checkpoint_callback
    logged = keep.best_model_score.item()
    for method, metric in (("test", "test_loss"), ("validate", "val_loss"), ("test", "test_loss")):
        found = getattr(trainer, method)(model, Data(), ckpt_path="best", verbose=False)[0][metric]
        assert found == pytest.approx(logged, rel=1e-5)
    loaded = load_from_checkpoint(Net, keep.best_model_path)
    assert reference_loss(loaded.state_dict()) == pytest.approx(logged, rel=1e-5)
    with merged(loaded.eval()):
        found = make_trainer(tmp_path).test(loaded, Data(), verbose=False)[0]["test_loss"]
    assert found == pytest.approx(logged, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_hold_the_values_of_lightnings_own_full_checkpoint(tmp_path, name: str):
    """That of a model which was injected by hand, in a Trainer without the callback."""
    alone = Net()
    inject(alone, lora_with_effect().config)
    fit(tmp_path / "alone", alone, ALL[name]())
    for kind in KINDS:
        fit(tmp_path / kind, Net(), lora_with_effect(save=kind), ALL[name]())
        for file in (tmp_path / kind).glob("*.ckpt"):
            own = torch.load(tmp_path / "alone" / file.name, weights_only=True)
            found = torch.load(file, weights_only=True)
            averaged = found["lora"]["adapter"] if kind == "merged" else found["state_dict"]
            assert averaged.keys() == (own["state_dict"].keys() if kind == "full" else adapter_names(own["state_dict"]))
            assert_same_tensors(averaged, {n: own["state_dict"][n] for n in averaged})
            assert found.keys() - own.keys() == {"lora"}
            assert_same_tensors(found.get("averaging_state"), own.get("averaging_state"))
            if "current_model_state" in own:
                current = found["current_model_state"]
                assert current.keys() >= adapter_names(own["state_dict"])
                assert_same_tensors(current, {n: own["current_model_state"][n] for n in current})
            if kind == "merged":
                loss = reference_loss(found["state_dict"])
                assert loss == pytest.approx(reference_loss(own["state_dict"]), rel=1e-5)


def adapter_names(state: Mapping[str, Any]) -> set[str]:
    return {n for n in state if "lora_" in n or n.rpartition(".")[2] in ("running_mean", "running_var", BATCHES)}


@pytest.mark.slow
@weight_averaging
def test_the_drift_of_a_long_average_is_not_another_base(tmp_path):
    """With Lightning's default decay of 0.999 a frozen weight moves by 1e-5 of itself in 300 steps."""
    model = Net()
    before = base_weights(model)
    trainer = fit(tmp_path, model, lora_with_effect(), EMAWeightAveraging(), data=Data(80))
    moved = max(((model.state_dict()[n] - v) / v).abs().nan_to_num().max() for n, v in before.items())
    assert moved > 1.1e-5
    trainer.test(model, Data(), ckpt_path="best", verbose=False)
    other = Net(seed=2)
    inject(other, lora_with_effect().config)
    with pytest.raises(LoRAError, match="belongs to another base"):
        load_adapter(other, trainer.checkpoint_callback.best_model_path)
    with torch.no_grad():
        model.body[3].weight.mul_(1.05)
    with pytest.raises(LoRAError, match="belongs to another base"):
        trainer.test(model, Data(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("name", NAMES)
def test_averaging_callback_listed_first_is_refused_with_the_order(tmp_path, name: str):
    swapper, model = ALL[name](), Net()
    kept = weights(model)
    with pytest.raises(
        LoRAError, match=rf"must come after .*callbacks=\[LoRACallback\(...\), {type(swapper).__name__}"
    ):
        make_trainer(tmp_path, swapper, lora_with_effect()).fit(model, Data())
    assert_same_tensors(weights(model), kept)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_averaging_callback_listed_first_is_harmless_in_evaluation(tmp_path):
    model = Net()
    before = base_weights(model)
    found = make_trainer(tmp_path, swa(), lora_with_effect()).test(model, Data(), verbose=False)[0]["test_loss"]
    assert found == pytest.approx(reference_loss(model.state_dict()), rel=1e-5)
    assert_as_found(model, before)

"""LoRACallback(attach=...): frozen adapters beside the trained one, through the life of a Trainer."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import (
    LoRACallback,
    LoRACLI,
    LoRAError,
    attach,
    attached,
    detach,
    inject,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merged,
    read_adapter,
    save_adapter,
    scaled,
    set_strength,
    take_adapter,
)
from lightning_lora.adapter.adapter import Adapter
from support.runs.lightning_versions import PLAIN_TYPES_ONLY
from support.runs.training import (
    BuiltInConfigureModel,
    Data,
    Net,
    RebuiltInSetup,
    assert_same_tensors,
    make_trainer,
    outputs,
)
from support.runs.with_callback import BATCHES, TARGETS, Watched, lora, run

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


def trained_adapter(seed: int, **options: Any) -> Adapter:
    """An adapter of Net's linear layers that has an effect."""
    model = Net()
    inject(model, lora(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False} | options).config, seed=seed)
    return take_adapter(model)


def folder(path: Path, seed: int = 1, **options: Any) -> Path:
    save_adapter(trained_adapter(seed, **options), path)
    return path


def with_products(model: Net, *adapters: tuple[Adapter, float]) -> Net:
    """A plain model whose weights have the products of adapters added, in float64 and from the definition."""
    for adapter, weight in adapters:
        for name, layer in adapter.layers.items():
            a, b = (adapter.tensors[f"{name}.lora_{leaf}"].double() for leaf in "AB")
            base = model.get_parameter(f"{name}.weight")
            base.data = (base.double() + weight * layer.scaling * b @ a).to(base.dtype)
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Sees(L.Callback):
    """What is attached, and what an optimizer holds, when a fit starts."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = attached(pl_module)
        self.outputs = outputs(pl_module)
        self.held = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}


# --- attaching in setup ---

SOURCES = {
    "text": lambda path: str(folder(path / "sft")),
    "adapter in memory": lambda path: read_adapter(folder(path / "sft")),
    "with a weight": lambda path: {"source": folder(path / "sft"), "strength": 0.5},
}


@pytest.mark.parametrize("form", SOURCES)
def test_adapter_is_attached_before_the_fit_and_frozen(tmp_path: Path, form: str):
    sees, model = Sees(), Net()
    weight = 0.5 if form == "with a weight" else 1.0
    run(make_trainer(tmp_path, lora(attach={"sft": SOURCES[form](tmp_path)}), sees), "fit", model)
    assert sees.weights["sft"] == weight
    close(sees.outputs, outputs(with_products(Net(), (trained_adapter(1), weight))))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{leaf}" for name in TARGETS for leaf in "AB"}
    assert sees.held == {id(p) for p in model.parameters()} & sees.held
    assert len(model.state_dict()) == len(Net().state_dict()) + 2 * len(TARGETS)


def test_what_is_beside_stays_as_it_is_and_the_model_computes_both(tmp_path: Path):
    sft = trained_adapter(1)
    run(make_trainer(tmp_path, lora(attach={"sft": sft}), max_epochs=2), "fit", model := Net())
    close(outputs(model), outputs(with_products(Net_of(model), (take_adapter(model), 1.0), (sft, 1.0))))
    with merged(model):
        close(outputs(model), outputs(with_products(Net_of(model), (take_adapter(model), 1.0), (sft, 1.0))))
    detach(model, "sft")
    close(outputs(model), outputs(with_products(Net_of(model), (take_adapter(model), 1.0))))


def Net_of(model: Net) -> Net:  # noqa: N802
    """A plain copy of the base of a model."""
    base = Net()
    base.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
    return base


@pytest.mark.parametrize("first", ["inject and attach", "attach and inject"])
def test_it_goes_with_a_model_that_was_injected_or_attached_to_before(tmp_path: Path, first: str):
    sft, sees, model = trained_adapter(1), Sees(), Net()
    for verb in first.split(" and "):
        if verb == "inject":
            inject(model, lora().config)
        else:
            attach(model, sft, name="sft", strength=0.5)
    callback = lora(attach={"sft": {"source": sft, "strength": 0.5}})
    run(make_trainer(tmp_path, callback, sees), "fit", model)
    close(sees.outputs, outputs(with_products(Net(), (sft, 0.5))))
    factors = {id(p) for p in model.parameters() if p.requires_grad}
    assert factors == sees.held & factors
    assert len(factors) == 2 * len(TARGETS)
    assert all(float(model.get_parameter(f"{name}.lora_B").detach().abs().sum()) for name in TARGETS)


@pytest.mark.parametrize("make", [BuiltInConfigureModel, RebuiltInSetup])
def test_layers_that_are_built_in_setup_get_it_too(tmp_path: Path, make: type[Net]):
    sft, sees = trained_adapter(1), Sees()
    trainer = make_trainer(tmp_path, lora(attach={"sft": sft}), sees)
    run(trainer, "fit", model := make())
    close(sees.outputs, outputs(with_products(Net(), (sft, 1.0))))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trained = outputs(model)
    other = make_trainer(tmp_path, lora(attach={"sft": sft}))
    other.test(model, Data(), ckpt_path=tmp_path / "a.ckpt", verbose=False, **PLAIN_TYPES_ONLY)
    close(outputs(model), trained)


class RebuiltByFits(Net):
    """Builds its body anew in setup of a fit, after something was attached to it."""

    def setup(self, stage: str) -> None:
        self.build_body()


def test_layers_built_anew_lose_what_only_the_user_can_attach(tmp_path: Path):
    attach(model := RebuiltByFits(), trained_adapter(1), name="sft")
    with pytest.raises(LoRAError, match=r"built layers anew.*LoRACallback\(attach=\{'sft': source\}\)"):
        run(make_trainer(tmp_path, lora()), "fit", model)
    sees = Sees()
    run(make_trainer(tmp_path, lora(attach={"sft": trained_adapter(1)}), sees), "fit", RebuiltByFits())
    close(sees.outputs, outputs(with_products(Net(), (trained_adapter(1), 1.0))))


class Attaching(Net):
    """Attaches an adapter where it is built."""

    def __init__(self, width: int = 8, seed: int = 1, lr: float = 0.05) -> None:
        super().__init__(width, seed, lr)
        attach(self, trained_adapter(1), name="sft", strength=0.5)


def test_module_that_attaches_by_itself_loads_from_its_checkpoint(tmp_path: Path):
    trainer = make_trainer(tmp_path, lora())
    run(trainer, "fit", model := Attaching())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Attaching, tmp_path / "a.ckpt")
    assert torch.equal(outputs(loaded), outputs(model))
    assert attached(loaded) == {"sft": 0.5}


def test_merge_after_fit_leaves_all_in_the_weights(tmp_path: Path):
    models = []
    for merge_after_fit in (True, False):
        torch.manual_seed(0)
        callback = lora(attach={"sft": trained_adapter(1)}, merge_after_fit=merge_after_fit)
        run(make_trainer(tmp_path, callback), "fit", model := Net())
        models.append(model)
    assert models[0].state_dict().keys() == Net().state_dict().keys()
    close(outputs(models[0]), outputs(models[1]))


def test_later_stage_keeps_the_weight_that_was_set_since(tmp_path: Path):
    sft, model = trained_adapter(1), Net()
    trainer = make_trainer(tmp_path, lora(attach={"sft": sft}))
    run(trainer, "fit", model)
    set_strength(model, 0.25, "sft")
    expected = outputs(model)
    run(trainer, "test", model)
    assert attached(model)["sft"] == 0.25
    assert torch.equal(outputs(model), expected)
    with pytest.raises(LoRAError, match=re.escape("detach(model, 'sft')")):
        run(make_trainer(tmp_path, lora(attach={"sft": trained_adapter(2)})), "test", model)


@pytest.mark.parametrize(
    "given",
    [
        ["folder"],
        {"sft": {"strength": 0.5}},
        {"sft": {"source": "folder", "wieght": 0.5}},
        {"sft": {"source": "folder", "strength": "strong"}},
    ],
    ids=["a list", "no source", "another key", "no number"],
)
def test_wrong_value_is_refused_at_once(given: Any):
    with pytest.raises(LoRAError, match="LoRACallback: attach"):
        LoRACallback(attach=given)


# --- evaluation ---


class Preferring(Net):
    """Compares itself with the model without the trained adapter, in training and validation, as DPO does."""

    def compare(self, batch: Any) -> torch.Tensor:
        with torch.no_grad(), scaled(self, 0.0):
            reference = self(batch[0]).log_softmax(1)
        return F.cross_entropy(self(batch[0]).log_softmax(1) - 0.5 * reference, batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.compare(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.compare(batch).item(), is_merged(self)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((F.cross_entropy(self(batch[0]), batch[1]).item(), is_merged(self)))


def test_evaluations_that_call_scaled_stop_merging_and_say_so_once(tmp_path: Path, caplog, monkeypatch):
    merges = []
    import lightning_lora.trainer.evaluation as evaluation

    inner = evaluation.merge_listed
    monkeypatch.setattr(evaluation, "merge_listed", lambda *a, **o: merges.append(1) or inner(*a, **o))
    sft, seen_by = trained_adapter(1), {}
    for merged_eval in (False, True):
        torch.manual_seed(0)
        with caplog.at_level(logging.INFO, "lightning_lora"):
            trainer = make_trainer(tmp_path, lora(attach={"sft": sft}, merged_eval=merged_eval), max_epochs=3)
            run(trainer, "fit", model := Preferring())
        seen_by[merged_eval] = model.seen
    assert len(merges) == 1
    assert not any(was for _, was in seen_by[True])
    assert [loss for loss, _ in seen_by[True]] == pytest.approx([loss for loss, _ in seen_by[False]], rel=1e-5)
    said = [record.message for record in caplog.records if "scaled" in record.message]
    assert len(said) == 1
    run(trainer, "test", model)  # which calls no scaled, and merges
    assert model.seen[-1][1]


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-true", 0.03)])
def test_merged_evaluation_equals_the_factored_one(tmp_path: Path, precision: str, tolerance: float):
    sft, losses = trained_adapter(1), {}
    for merged_eval in (True, False):
        torch.manual_seed(0)
        callback = lora(attach={"sft": sft}, merged_eval=merged_eval)
        trainer = make_trainer(tmp_path, callback, max_epochs=2, precision=precision)
        model = Watched()
        for stage in ("fit", "test"):
            run(trainer, stage, model)
        assert {was for stage, was, _ in model.seen if stage != "train"} == {merged_eval}
        losses[merged_eval] = [loss for *_, loss in model.seen]
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)
    assert len(losses[True]) == 5 * BATCHES


# --- checkpoints ---


def fit(path: Path, callback: LoRACallback, epochs: int, ckpt_path: Path | None = None, *others: L.Callback) -> Any:
    """A fit that saves each epoch, and all of its state at the end."""
    saves = ModelCheckpoint(path, "{epoch}", save_top_k=-1, enable_version_counter=False)
    trainer = make_trainer(path, callback, *others, saves, max_epochs=epochs)
    trainer.fit(model := Net(), Data(BATCHES), ckpt_path=ckpt_path, **PLAIN_TYPES_ONLY)
    return model, {"model": model.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}


class Weakens(L.Callback):
    """Gives what is beside another strength in the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            set_strength(pl_module, 0.25, "sft")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_checkpoint_holds_the_trained_one_alone_and_resumes_bit_for_bit(tmp_path: Path, kind: str):
    beside = {"sft": trained_adapter(1), "style": trained_adapter(2, r=1)}
    torch.manual_seed(0)
    model, whole = fit(tmp_path, lora(save=kind, attach=beside), 4, None, Weakens())
    file = tmp_path / "epoch=1.ckpt"
    saved = torch.load(file, weights_only=True)
    stated = {name: row[0] for name, row in saved["lora"]["beside"].items()}
    assert stated == {"sft": 0.25, "style": 1.0}
    tensors = saved["lora"]["adapter"] if kind == "merged" else saved["state_dict"]
    assert {name for name in tensors if "lora" in name} == {f"{n}.lora_{leaf}" for n in TARGETS for leaf in "AB"}
    torch.manual_seed(1)
    again = lora(save=kind, attach=dict(reversed(beside.items())))
    resumed, state = fit(tmp_path, again, 4, file)
    assert_same_tensors(state, whole)
    assert attached(resumed)["sft"] == 0.25
    assert torch.equal(outputs(resumed), outputs(model))


@pytest.mark.slow
def test_merged_checkpoint_holds_all_for_programs_without_this_package(tmp_path: Path):
    model, _ = fit(tmp_path, lora(save="merged", attach={"sft": trained_adapter(1)}), 1)
    close(outputs(Net.load_from_checkpoint(tmp_path / "epoch=0.ckpt", **PLAIN_TYPES_ONLY)), outputs(model))


@pytest.mark.slow
def test_options_that_are_left_out_are_the_checkpoints_and_beside_is_named(tmp_path: Path):
    sft = trained_adapter(1)
    model, _ = fit(tmp_path, lora(attach={"sft": {"source": sft, "strength": 0.5}}), 1)
    file = tmp_path / "epoch=0.ckpt"
    missing = r"trained with 'sft' \(strength 0\.5\) attached.*attach=\{'sft': \{'source': source, 'strength': 0\.5\}\}"
    for stage in ("fit", "test"):
        with pytest.raises(LoRAError, match=missing):
            getattr(make_trainer(tmp_path, LoRACallback(), max_epochs=2), stage)(
                Net(), Data(), ckpt_path=file, **PLAIN_TYPES_ONLY
            )
    with pytest.raises(LoRAError, match="another adapter 'sft'"):
        make_trainer(tmp_path, LoRACallback(attach={"sft": trained_adapter(2)})).test(
            Net(), Data(), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY
        )
    more = {"sft": sft, "more": trained_adapter(2)}
    with pytest.raises(LoRAError, match="without 'more'"):
        make_trainer(tmp_path, LoRACallback(attach=more)).test(
            Net(), Data(), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY
        )
    make_trainer(tmp_path, LoRACallback(attach={"sft": sft})).test(
        read := Net(), Data(), ckpt_path=file, verbose=False, **PLAIN_TYPES_ONLY
    )
    assert attached(read)["sft"] == 0.5
    assert torch.equal(outputs(read), outputs(model))


@pytest.mark.filterwarnings("ignore:lightning_lora. adapter. belongs to another base")  # until that one is loaded
@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_load_from_checkpoint_says_the_lines_to_write_and_they_work(tmp_path: Path, kind: str):
    source = folder(tmp_path / "sft")
    model, _ = fit(tmp_path, lora(save=kind, attach={"sft": {"source": source, "strength": 0.5}}), 1)
    with pytest.raises(LoRAError, match="trained with 'sft'") as refused:
        load_from_checkpoint(Net, tmp_path / "epoch=0.ckpt")
    built = "Net(seed=5)" if kind == "full" else "Net()"  # a full one brings its base
    lines = re.search(r"model = Net\(.*\)", str(refused.value))[0].replace("Net(...)", built)
    scope = {"Net": Net, "source": source, "attach": attach, "load_adapter": load_adapter, "torch": torch}
    exec(lines, scope)
    assert torch.equal(outputs(scope["model"]), outputs(model))


# --- several processes ---


def test_processes_that_would_attach_alone_are_refused(tmp_path: Path):
    inject(model := Net(), lora().config)
    callback = lora(attach={"sft": trained_adapter(1)})
    trainer = make_trainer(tmp_path, callback, strategy="ddp_spawn", devices=2)
    trainer.state.fn = "fit"
    with pytest.raises(LoRAError, match=re.escape("attach(model, source, name='sft') before fit")):
        callback.setup(trainer, model, "fit")
    attach(model, trained_adapter(1), name="sft")
    callback.setup(trainer, model, "fit")


# --- configuration and words ---


QUIET = """
trainer:
  accelerator: cpu
  logger: false
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
"""
LORA = QUIET + "lora: {r: 2, attach: {sft: sft, style: {source: style, strength: 0.5}}}"


@pytest.mark.slow
@pytest.mark.usefixtures("as_program")
def test_yaml_names_them(tmp_path: Path):
    folder(tmp_path / "sft", 1)
    folder(tmp_path / "style", 2)
    Path("c.yaml").write_text(LORA)
    made = LoRACLI(Net, Data, args=["fit", "--config", "c.yaml"], save_config_callback=None, seed_everything_default=1)
    weights = attached(made.model)
    assert (weights["sft"], weights["style"]) == (1.0, 0.5)

"""verify=True: logged errors equal an independent computation, suspicious layers are named, nothing is left."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, merged, unmerge
from lightning_lora.metrics import MergeError
from lightning_lora.model.adapted_model import Listing
from lightning_lora.model.self_check import watch
from lightning_lora.nn.lora_layer import LoRALayer
from support.notices import lightning_logger
from support.runs import TARGETS, At, Watched, assert_as_found, base_weights, lora_with_effect
from support.training import Data, Net, inputs, make_trainer

NAMES = ("lora_merge_error_max", "lora_merge_error_relative")


def expected_errors(model: nn.Module, batch: torch.Tensor, merged_eval: bool = True) -> list[float]:
    """Merged and factored output of each adapted layer of a copy, on the input that it gets in this evaluation."""
    twin = copy.deepcopy(model).eval()
    unmerge(twin)
    layers = [module for module in twin.modules() if isinstance(module, LoRALayer)]
    inputs: dict[nn.Module, torch.Tensor] = {}
    handles = [layer.register_forward_hook(lambda layer, args, _: inputs.update({layer: args[0]})) for layer in layers]
    with torch.no_grad():
        with merged(twin) if merged_eval else nullcontext():
            twin(batch)
        for handle in handles:
            handle.remove()
        factored = [layer(inputs[layer]).double() for layer in layers]
        with merged(twin):
            outputs = [layer(inputs[layer]).double() for layer in layers]
    difference = torch.cat([(one - other).flatten() for one, other in zip(outputs, factored, strict=True)])
    total = torch.cat([output.flatten() for output in factored])
    return [difference.abs().max().item(), (difference.norm() / total.norm()).item()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("merged_eval", [True, False])
@pytest.mark.parametrize("fn", ["fit", "validate", "test"])
def test_verify_logs_the_errors_computed_by_hand(tmp_path, fn: str, merged_eval: bool, precision: str):
    model, expected, callback = Net(), [], lora_with_effect(verify=True, merged_eval=merged_eval)
    stage = {"fit": "validation", "validate": "validation", "test": "test"}[fn]

    def compute(trainer: Any, module: nn.Module) -> None:
        if not trainer.sanity_checking:
            (data, *_), *_ = Data().val_dataloader()
            expected.append(expected_errors(module, data.to(module.head.weight.dtype), merged_eval))

    note = At(f"on_{stage}_batch_start", compute)  # copies and runs a model that is being watched
    trainer = make_trainer(tmp_path, callback, note, precision=precision, max_epochs=2, num_sanity_val_steps=2)
    getattr(trainer, fn)(model, Data())
    logged = [trainer.logged_metrics.get(name) or trainer.callback_metrics[name] for name in NAMES]
    assert [value.item() for value in logged] == pytest.approx(expected[0], rel=1e-5)
    assert expected[0][0] > 0
    assert expected[0][1] < (1e-2 if precision == "bf16-true" else 1e-6)
    assert not [hook for module in model.modules() for hook in module._forward_hooks]


def test_verify_in_prediction_says_the_errors_in_one_line(tmp_path, caplog):
    model = Net()
    with caplog.at_level(logging.INFO, logger=lightning_logger()):
        make_trainer(tmp_path, lora_with_effect(verify=True)).predict(model, Data())
    largest, relative = expected_errors(model, next(iter(Data().val_dataloader()))[0])
    lines = [record.getMessage() for record in caplog.records if "verified" in record.getMessage()]
    assert lines == [f"LoRACallback: verified, {NAMES[0]} {largest:.3g}, {NAMES[1]} {relative:.3g}"]


def test_verify_watches_one_batch_of_each_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("lightning_lora.trainer.evaluation.watch", lambda module: calls.append(1) or watch(module))
    trainer = make_trainer(tmp_path, lora_with_effect(verify=True), max_epochs=3, num_sanity_val_steps=2)
    model = Net()
    trainer.fit(model, Data())
    assert len(calls) == 1
    trainer.validate(model, Data(), verbose=False)
    trainer.test(model, Data(), verbose=False)
    trainer.predict(model, Data())
    assert len(calls) == 4
    make_trainer(tmp_path, lora_with_effect(), max_epochs=1).fit(Net(), Data())
    assert len(calls) == 4


def test_verify_does_not_change_the_run(tmp_path):
    runs = {}
    for verify in (True, False):
        torch.manual_seed(0)
        model = Watched()
        before = base_weights(model)
        make_trainer(tmp_path, lora_with_effect(verify=verify, lora_dropout=0.2), max_epochs=2).fit(model, Data())
        assert_as_found(model, before)
        runs[verify] = (model.seen, model.state_dict())
    assert runs[True][0] == runs[False][0]
    assert all(torch.equal(runs[True][1][name], value) for name, value in runs[False][1].items())


class SkipsAnEffect(Net):
    """One layer that is never called, one that is read instead, and one that works."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(self.body(x), self.read_only.weight)

    def build_head(self) -> None:
        super().build_head()
        self.read_only = nn.Linear(8, 3)


def test_verify_names_layers_that_never_ran(tmp_path):
    callback = LoRACallback(r=2, verify=True, init_lora_weights=False)
    with pytest.warns(UserWarning, match=r"these adapted layers never ran: unused\. Is the forward another"):
        make_trainer(tmp_path, callback).validate(SkipsAnEffect(), Data(), verbose=False)


def test_verify_names_adapters_without_effect(tmp_path):
    """B is zero before training; afterwards only that of a layer whose gradient is cut off."""

    class CutOff(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body[4](self.body[3](self.body[:3](x).detach())))

    model, callback = CutOff(), LoRACallback(r=2, verify=True)
    with pytest.warns(UserWarning, match=r"adapters had no effect: body\.0, body\.3, head\. They have the values"):
        make_trainer(tmp_path, callback).validate(model, Data(), verbose=False)
    effect = r"LoRACallback: these adapters had no effect: body\.0\. They have .* trained or loaded them yet\.$"
    gradient = r"no gradient .* 1 of 3 .*'body\.0'"
    with pytest.warns(UserWarning, match=effect), pytest.warns(UserWarning, match=gradient):
        make_trainer(tmp_path, callback).fit(model, Data())


def test_verify_says_that_a_small_effect_may_not_show_in_16_bits(tmp_path):
    """Whether it does depends on the digits; in float32 the same adapter is reported to have an effect."""
    model, callback = Net(), LoRACallback(r=2, verify=True, target_modules=["head"])
    inject(model, LoRAConfig(r=2, target_modules=["head"]))
    nn.init.constant_(model.head.lora_B, 1e-6)
    question = r"no effect: head\. Is the forward another .* adapted, or is the change too small for .* bfloat16\?"
    with pytest.warns(UserWarning, match=question):
        make_trainer(tmp_path, callback, precision="bf16-mixed").validate(model, Data(), verbose=False)
    make_trainer(tmp_path, callback).validate(model, Data(), verbose=False)


class Attention(Net):
    """Attention whose out_proj torch reads instead of calling, inside torch's own encoder and by itself."""

    def build_body(self) -> None:
        self.embed = nn.Linear(6, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(x)[None])
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0][0])


TARGETINGS = [
    "all-linear",
    ["attention", "self_attn"],
    ["out_proj"],
    ["linear1", "linear2", "self_attn", "attention"],
]


@pytest.mark.parametrize("merged_eval", [True, False])
@pytest.mark.parametrize("targets", TARGETINGS, ids=str)
def test_verify_reports_no_attention_that_is_right(tmp_path, targets: Any, merged_eval: bool):
    model = Attention()
    callback = LoRACallback(r=2, verify=True, merged_eval=merged_eval, target_modules=targets, init_lora_weights=False)
    trainer = make_trainer(tmp_path, callback)
    trainer.validate(model, Data(), verbose=False)  # a warning would be an error
    assert 0 < trainer.callback_metrics[NAMES[0]] < 1e-5


@pytest.mark.parametrize("targets", TARGETINGS, ids=str)
def test_verify_reports_attention_without_effect(tmp_path, targets: Any):
    with pytest.warns(UserWarning, match="adapters had no effect: ") as found:
        make_trainer(tmp_path, LoRACallback(r=2, verify=True, target_modules=targets)).validate(
            Attention(), Data(), verbose=False
        )
    (message,) = [str(w.message) for w in found if "LoRACallback" in str(w.message)]
    assert "never ran" not in message
    assert "encoder.layers.1.self_attn" in message
    assert "attention" in message


class FailsInTheFirstBatch(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        raise RuntimeError("on purpose")


def test_exception_in_the_watched_batch_leaves_no_hook_behind(tmp_path):
    model = FailsInTheFirstBatch()
    before = base_weights(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        make_trainer(tmp_path, lora_with_effect(verify=True)).validate(model, Data())
    assert_as_found(model, before)
    assert not [hook for module in model.modules() for hook in module._forward_hooks]
    compiled = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)  # compiling is on again
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1
    assert compiled(torch.ones(1)).item() == 2


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


def test_verify_looks_into_compiled_modules(tmp_path):
    """A compiled graph passes over hooks; its layers are checked all the same, under their own names."""
    model = Compiled()
    trainer = make_trainer(tmp_path, lora_with_effect(verify=True))
    trainer.validate(model, Data(), verbose=False)  # compiles after the watched batch
    trainer.validate(model, Data(), verbose=False)  # has its graph
    plain = Net()
    reference = make_trainer(tmp_path, lora_with_effect(verify=True))
    reference.validate(plain, Data(), verbose=False)
    assert 0 < trainer.callback_metrics[NAMES[0]] < 1e-5
    with pytest.warns(UserWarning, match=r"no effect: body\.0, body\.3, head"):
        make_trainer(tmp_path, LoRACallback(r=2, verify=True)).validate(Compiled(), Data(), verbose=False)


def test_verify_metric_over_ranks_equals_that_of_all_outputs():
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


def test_hooks_of_the_user_are_no_error_of_merging():
    """One that changes a layer's outputs acts after they are compared, merged or not."""
    inject(model := Net().eval(), LoRAConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.head.register_forward_hook(lambda module, args, output: 3 * output)
    for around in (merged, nullcontext):
        with around(model), watch(Listing(model)) as verification:
            model(inputs())
        assert verification.error.compute()["max"] < 1e-5

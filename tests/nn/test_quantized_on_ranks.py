"""Quantized bases on ranks: steps, runs and files under FSDP2 (4 bits alone) and DDP are those of one device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_lora import (
    LoRACallback,
    LoRAError,
    disable_adapter,
    is_merged,
    load_adapter,
    load_from_checkpoint,
    merge,
    merged_state_dict,
    save_adapter,
    save_merged,
    summary,
    unmerge,
)
from support.covering import covering
from support.models.networks import fingerprint
from support.models.quantized import (
    FEATURES,
    NAMES,
    NF4,
    OF_TORCHAO,
    OUTPUTS,
    WIDTH,
    PlainNet,
    QuantizedNet,
    adapted,
    inputs,
    network,
    packed_bits,
    quantized,
)
from support.ranks.processes import BACKEND, world
from support.ranks.sharded import DEVICE, make_trainer, model_parallel, whole

KINDS = [NF4, "nf4", "nf4 nested", "nf4 in bfloat16", "fp4"]
EIGHT_BITS = ["int8", OF_TORCHAO[0]]
OF_BOTH_PACKAGES = [NF4, "nf4 in bfloat16"]


class ShardedNet(QuantizedNet):
    """Shards itself in configure_model, as a program for FSDP2 does."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        shard_(self.network, self.device_mesh["data_parallel"])


def shard_(net: Any, mesh: Any = None) -> Any:
    if not any(isinstance(parameter, DTensor) for parameter in net.parameters()):
        mesh = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def data() -> DataLoader[Any]:
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    labels = torch.randint(OUTPUTS, (16,), generator=torch.Generator().manual_seed(1))
    rows = TensorDataset(inputs(16, 1), labels)
    sampler: DistributedSampler[Any] = DistributedSampler(rows, size, rank, shuffle=False)
    return DataLoader(rows, batch_size=4 // size, sampler=sampler)


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    """Skip where the package of the test's kind is missing; NF4Tensor is the kind of tests without one."""
    kind = request.node.callspec.params.get("kind", NF4) if hasattr(request.node, "callspec") else NF4
    pytest.importorskip("torchao.quantization" if kind in (NF4, *OF_TORCHAO) else "bitsandbytes")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


# --- steps ---

STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "autocast": {},
    "16 bits": {"dtype": torch.bfloat16},
    "rank patterns": {"rank_pattern": {"2": 2}},
    "pissa": {"init_lora_weights": "pissa"},
}


def step(way: str, model: Any) -> dict[str, torch.Tensor]:
    """The output and the gradients of A and B in two steps."""
    results = {}
    for number in range(2):
        torch.manual_seed(number)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=way == "autocast"):
            results[f"{number}/output"] = output = model(inputs(dtype=STEPS[way].get("dtype", torch.float32)))
        output.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return whole({**{name: value.detach() for name, value in results.items()}, **gradients})


def build(way: str, kind: str = NF4) -> Any:
    torch.manual_seed(3)
    return adapted(kind, **STEPS[way])


def sharded_step(way: str, kind: str) -> None:
    expected, model = step(way, build(way, kind)), shard_(build(way, kind))
    shard = model[0].weight.to_local()
    packed = shard.quantized_data if kind == NF4 else shard
    assert packed.nbytes * 2 * dist.get_world_size() == FEATURES * WIDTH
    found = step(way, model)
    assert len(expected) == 8
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind"), covering([*STEPS], KINDS, meet=1))
def test_outputs_and_gradients_have_the_bits_of_one_device(way, kind):
    world().run(sharded_step, way, kind)


# --- what is read and written ---


def described(model: Any, folder: Path) -> dict[str, Any]:
    """What is said and written of a model; the tensors are whole."""
    save_adapter(model, folder / "adapter")
    save_merged(model, folder / "merged", dequantize="bfloat16")
    shown = summary(model)
    return {
        "fingerprint": fingerprint(model),
        "merged": whole(merged_state_dict(model, dequantize="float32")),
        "shown": (shown.trainable, shown.total, shown.quantized, len(shown.unmerged)),
    }


def sharded_description(folder: Path, kind: str) -> tuple[dict[str, Any], bool]:
    model = shard_(build("plain", kind))
    counted = summary(model).total
    before = bits_of_whole(model, kind)
    factored = model(inputs())
    merge(model)
    assert is_merged(model)
    assert torch.equal(model(inputs()), factored)
    found = described(model, folder)
    unmerge(model)
    with disable_adapter(model):
        assert torch.equal(model(inputs()), quantized(kind)(inputs()))
    assert bits_of_whole(model, kind) == before
    assert counted == summary(model).total
    return found, before == packed_bits(quantized(kind))


def bits_of_whole(model: Any, kind: str) -> list[bytes]:
    """The bytes of all weights, gathered."""
    plain = quantized(kind)
    for position in (0, 2, 4):
        whole_weight = model[position].weight.full_tensor()
        if kind == NF4:
            plain[position].weight = torch.nn.Parameter(whole_weight, requires_grad=False)
        else:
            plain[position].weight.data = whole_weight
            plain[position].weight.quant_state = model[position].quant_state
    return packed_bits(plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OF_BOTH_PACKAGES)
def test_fingerprint_summary_and_files_are_those_of_one_device(tmp_path, kind):
    expected = described(build("plain", kind), tmp_path / "one")
    for found, kept in world().run(sharded_description, tmp_path / "two", kind):
        assert kept
        assert found["fingerprint"] == expected["fingerprint"]
        assert found["shown"] == expected["shown"]
        assert all(torch.equal(found["merged"][name], value) for name, value in expected["merged"].items())
    files = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors"]
    for file in files:
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    model = quantized(kind)
    load_adapter(model, tmp_path / "two/adapter")
    assert torch.equal(model(inputs()), build("plain", kind)(inputs()))


# --- a Trainer ---

SAVES: dict[str, dict[str, Any]] = {
    "adapter": {"save": "adapter"},
    "merged": {"save": "merged", "dequantize": "float32"},
}


def lora(**options: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "lora_alpha": 4, "seed": 1} | options)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return whole({name: p.detach() for name, p in model.named_parameters() if "lora_" in name})


def fit_alone(path: Path, kind: str, epochs: int, source: Path | None = None, **options: Any) -> Any:
    model = QuantizedNet(kind)
    trainer = make_trainer(path, lora(**options), max_epochs=epochs)
    trainer.fit(model, data(), data(), ckpt_path=source)
    trainer.save_checkpoint(path / f"{epochs}.ckpt")
    return model, trainer


def fit(
    path: Path, kind: str, save: str, epochs: int, source: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train on all ranks, and save under `path`; the factors and the losses of this rank in validation."""
    model = ShardedNet(kind)
    trainer = model_parallel(path, lora(**SAVES[save]), max_epochs=epochs)
    trainer.fit(model, data(), data(), ckpt_path=source)
    trainer.save_checkpoint(path / f"{epochs}.ckpt")
    assert {merged for stage, merged, _ in model.seen if stage == "validation"} == {True}
    assert bits_of_whole(model.network, kind) == packed_bits(quantized(kind))
    save_adapter(model, path / "peft")
    return adapter_of(model), [float(trainer.callback_metrics["val_loss"])]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "save"), covering(OF_BOTH_PACKAGES, [*SAVES], meet=1))
def test_a_run_and_its_resumption_are_those_of_one_device_and_load_in_one_process(tmp_path, save, kind):
    alone, trainer = fit_alone(tmp_path / "alone", kind, 3)
    expected, loss = adapter_of(alone), float(trainer.callback_metrics["val_loss"])
    uninterrupted = world().run(fit, tmp_path / "whole", kind, save, 3)
    world().run(fit, tmp_path / "half", kind, save, 2)
    source = tmp_path / "half/2.ckpt"
    resumed = world().run(fit, tmp_path / "on", kind, save, 3, source)
    elsewhere = world(4).run(fit, tmp_path / "four", kind, save, 3, source)
    resumed_alone, _ = fit_alone(tmp_path / "one", kind, 3, source, **SAVES[save])
    for factors, losses in (*uninterrupted, *resumed, *elsewhere):
        assert_close(factors, expected)
        assert losses == pytest.approx([loss], rel=1e-6)
    assert_close(adapter_of(resumed_alone), expected)
    trained = uninterrupted[0][0]
    assert all(torch.equal(resumed[0][0][name], value) for name, value in trained.items())

    loaded = [load_from_checkpoint(QuantizedNet, tmp_path / "whole/3.ckpt"), QuantizedNet(kind), QuantizedNet(kind)]
    load_adapter(loaded[1], tmp_path / "whole/3.ckpt")
    load_adapter(loaded[2], tmp_path / "whole/peft")
    for model in loaded:
        assert packed_bits(model) == packed_bits(quantized(kind))
        found = adapter_of(model)
        assert all(torch.equal(found[name], value) for name, value in trained.items())
    with pytest.raises(LoRAError, match=rf"the base was quantized \({NAMES[kind]}\), here it is not quantized"):
        load_adapter(network(), tmp_path / "whole/peft")


class PlainSharded(PlainNet, ShardedNet):
    """Is quantized by the callback, and shards itself in configure_model."""


def fit_by_option(path: Path, precision: str) -> tuple[dict[str, torch.Tensor], set[str], bool]:
    model = PlainSharded()
    trainer = model_parallel(path, lora(quantize="nf4"), max_epochs=1, precision=precision)
    trainer.fit(model, data(), data())
    kinds = {type(model.network[position].weight.to_local()).__name__ for position in (0, 2, 4)}
    return adapter_of(model), kinds, bits_of_whole(model.network, NF4) == packed_bits(quantized(NF4))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_option_of_the_callback_quantizes_what_is_sharded_next(tmp_path, precision):
    model = PlainNet()
    trainer = make_trainer(tmp_path, lora(quantize="nf4"), max_epochs=1, precision=precision)
    trainer.fit(model, data(), data())
    for found, kinds, kept in world().run(fit_by_option, tmp_path, precision):
        assert kinds == {NF4}
        assert kept
        if precision == "32-true":
            assert_close(found, adapter_of(model))
        for name, value in adapter_of(model).items():  # AdamW turns the rounding of a small gradient into a whole step
            assert float((found[name] - value).abs().median()) < 5e-3
            assert float(found[name].norm()) > 0


def refused(path: Path) -> list[str]:
    model, said = ShardedNet(NF4), []
    with pytest.raises(LoRAError) as error:
        model_parallel(path, lora(quantize="nf4"), max_epochs=1).test(model, data(), path / "plain.ckpt")
    said.append(str(error.value))
    for kind in EIGHT_BITS:
        other = ShardedNet(kind)
        with pytest.raises(LoRAError) as error:
            model_parallel(path, lora()).fit(other, data(), data())
        said.append(str(error.value))
        assert model.seen == other.seen == []
    by_hand = adapted("int8")
    fully_shard(by_hand, mesh=init_device_mesh(DEVICE, (2,)))
    for verb in (lambda: save_adapter(by_hand, path / "adapter"), lambda: merge(by_hand)):
        with pytest.raises(LoRAError, match="'0': its quantized weight was sharded"):
            verb()
    return said


def test_a_plain_base_over_sharded_quantized_weights_and_sharding_of_8_bits_are_refused_by_name(tmp_path):
    quantized("int8")  # skips where its package is missing
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(PlainNet(), data(), data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for over, *eight_bits in world().run(refused, tmp_path):
        assert re.search(
            r"'network\.0\.weight' is quantized and sharded here.*Load the base before quantize_base", over
        )
        for kind, said in zip(EIGHT_BITS, eight_bits, strict=True):
            name = rf"'network\.0' is quantized \({NAMES[kind]}\), which ModelParallelStrategy cannot"
            assert re.search(rf"{name} .*strategy='ddp'", said)


def one_bad_rank(folder: Path) -> list[str]:
    model = shard_(build("plain"))
    with torch.no_grad():
        if dist.get_rank() == 1:
            model[2].lora_B.to_local().fill_(torch.inf)
    messages = []
    for verb in (
        lambda: save_merged(model, folder, dequantize="float32"),
        lambda: merged_state_dict(model, dequantize="bfloat16"),
    ):
        with pytest.raises(LoRAError) as error:
            verb()
        messages.append(str(error.value))
    return messages


def test_values_that_are_not_finite_on_one_rank_are_an_error_on_all(tmp_path):
    for messages in world().run(one_bad_rank, tmp_path / "merged"):
        assert all("'2.weight'" in message for message in messages)
    assert not (tmp_path / "merged").exists()


# --- DDP ---


def fit_replicas(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], bool]:
    """The trained factors, and whether the base has the bits that it had."""
    torch.manual_seed(dist.get_rank())  # another stream on every rank
    model, strategy = QuantizedNet(kind), DDPStrategy(process_group_backend=BACKEND)
    trainer = make_trainer(path, lora(), devices=dist.get_world_size(), strategy=strategy, max_epochs=2)
    trainer.fit(model, data(), data())
    trainer.save_checkpoint(path / "last.ckpt")
    return adapter_of(model), packed_bits(model.network) == packed_bits(quantized(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", *EIGHT_BITS, NF4])
def test_replicas_train_equal_adapters_as_one_process_does(tmp_path, kind):
    alone, _ = fit_alone(tmp_path / "alone", kind, 2)
    (first, kept), (second, also_kept) = world().run(fit_replicas, tmp_path / "both", kind)
    assert kept
    assert also_kept
    for name, value in adapter_of(alone).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
    saved = torch.load(tmp_path / "both/last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in saved)

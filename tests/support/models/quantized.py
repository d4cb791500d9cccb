"""Models with quantized weights, of bitsandbytes and torchao, and their float64 reference."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, inject, is_merged, quantize_base

OF_BITSANDBYTES = ["nf4", "nf4 nested", "nf4 in bfloat16", "fp4", "int8"]
OF_TORCHAO = ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"]
NF4 = "NF4Tensor"  # torchao's class, made by quantize_base
QUANTIZED = [*OF_BITSANDBYTES, *OF_TORCHAO, NF4]
NAMES = {  # how lightning_lora calls them
    "nf4": "nf4",
    "nf4 nested": "nf4",
    "nf4 in bfloat16": "nf4",  # its bytes are stored so, as FSDP needs them
    "fp4": "fp4",
    "int8": "int8",
    "Int8WeightOnlyConfig": "Int8Tensor",
    "IntxWeightOnlyConfig": "IntxUnpackedToInt8Tensor",
    "Float8WeightOnlyConfig": "Float8Tensor",
    NF4: NF4,
}
FEATURES, WIDTH, OUTPUTS = 128, 64, 32  # that bitsandbytes can pack for evaluation on any CPU


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, OUTPUTS)
    ).to(dtype)


def quantize_(model: nn.Module, kind: str, *, moved: bool = True, device: str = "cpu") -> Any:
    """Replace all linear layers, or their weights, by quantized ones. bitsandbytes quantizes when a layer is moved."""
    if kind == NF4:
        pytest.importorskip("torchao.quantization")
        quantize_base(model, "nf4")
        return model.to(device)
    if kind in OF_TORCHAO:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, getattr(torchao, kind)())
        return model.to(device)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, layer_of_bitsandbytes(child, kind))
    return model.to(device) if moved else model


def layer_of_bitsandbytes(linear: nn.Linear, kind: str) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    else:
        storage = torch.bfloat16 if kind.endswith("bfloat16") else torch.uint8
        options = {"quant_type": kind[:3], "compress_statistics": kind.endswith("nested"), "quant_storage": storage}
        layer = bnb.nn.Linear4bit(*sizes, bias=bias, **options)
    layer.weight.data = linear.weight.data
    layer.bias = linear.bias
    return layer


def quantized(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return quantize_(network(dtype), kind, **options)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Adapt a model with factors A and B that are both random, so that the adapter has an effect."""
    model = quantized(kind, dtype)
    inject(model, LoRAConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | options))
    return model


def values_of(layer: Any) -> Any:
    """The dequantized weight in float64, computed by the package that quantized it."""
    weight = layer.weight
    if not hasattr(weight, "quant_type") and not hasattr(weight, "SCB"):
        assert type(weight) is not nn.Parameter
        values = (
            weight.get_original_weight() if hasattr(weight, "get_original_weight") else weight.detach().dequantize()
        )
        return values.double().cpu()
    bnb = pytest.importorskip("bitsandbytes")
    if hasattr(weight, "SCB"):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales).double().cpu()
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double().cpu()


def reference(model: Any, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A plain network in float64 with W' = W + s * B @ A, of which A and B are parameters."""
    found = network(dtype)
    for position in (0, 2, 4):
        layer = model[position]
        plain = found[position]
        plain.weight = nn.Parameter(values_of(layer).to(dtype), requires_grad=False)
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        if hasattr(layer, "lora_A"):
            plain.A = nn.Parameter(layer.lora_A.detach().to(dtype))
            plain.B = nn.Parameter(layer.lora_B.detach().to(dtype))
    return found


def run_reference(found: nn.Sequential, x: torch.Tensor, scaling: float = 2.0) -> torch.Tensor:
    for position in (0, 2, 4):
        layer: Any = found[position]
        weight = layer.weight + scaling * layer.B @ layer.A if hasattr(layer, "A") else layer.weight
        x = F.linear(x, weight, layer.bias)
        x = torch.relu(x) if position < 4 else x
    return x


def packed_bits(model: nn.Module) -> list[bytes]:
    """All bytes that determine the values of the quantized weights."""
    found = []
    layers: list[Any] = list(model.modules())
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is None or not hasattr(layer, "in_features"):
            continue
        tensors = [weight.data] if type(weight.data) is torch.Tensor else list(vars(weight).values())
        state = getattr(weight, "quant_state", None)
        tensors += [state.absmax, state.code] if state is not None else []
        if hasattr(weight, "SCB"):
            tensors.append(layer.state.SCB if weight.SCB is None else weight.SCB)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                found.append(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def inputs(rows: int = 6, seed: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)


class QuantizedNet(L.LightningModule):
    """A classifier around a quantized network. Its weights depend only on its arguments."""

    def __init__(self, kind: str = "nf4", lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = self.build(kind)
        self.seen: list[tuple[str, bool, float]] = []

    def build(self, kind: str) -> Any:
        return quantized(kind)

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)

    def loss(self, stage: str, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.seen.append((stage, is_merged(self), loss.item()))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss("validation", batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss("test", batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams["lr"])
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class PlainNet(QuantizedNet):
    """The same classifier without quantization."""

    def build(self, kind: str) -> Any:
        return network()


def batches(seed: int = 1) -> DataLoader[Any]:
    labels = torch.randint(OUTPUTS, (12,), generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs(12, seed), labels), batch_size=4)


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

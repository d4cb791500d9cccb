"""The table of layers and variants: what training, merging, saving and PEFT make of each, from runs.

WRITE_TABLE=1 in the environment writes it into lightning_lora/nn/layers.md. Rows of what is not installed stay.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    initialize_from_data,
    inject,
    load_adapter,
    lora_param_groups,
    merge,
    merged_state_dict,
    save_adapter,
    unmerge,
)
from lightning_lora.nn.adapted_module import adapted_layers
from lightning_lora.nn.quantized import PACKS_FOR_CPU
from support.models.foreign import OtherLinear
from support.models.layers import Attention
from support.models.parameters import Experts, Model, Projected, Recurrent
from support.models.quantized import inputs, network, packed_bits, quantize_
from support.runs.notices import quiet_peers

pytestmark = [
    *quiet_peers,
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*encountered"),
    pytest.mark.filterwarnings("ignore:.* changes the base weights of the model"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:the following layers were initialized with init_lora_weights=True"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed"),
]
PAGE = Path(__file__).parents[2] / "lightning_lora" / "nn" / "layers.md"
BEGIN, END = "<!-- layers: written by tests/tables/test_layers_table.py -->", "<!-- end of layers -->"
HEAD = (
    "| variant | layers | train and merge | plain merged weights | to PEFT | from PEFT |",
    "|---|---|---|---|---|---|",
)
RIGHT = "right"
LEAST = 1e-3  # of the output's size that an adapter must change
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FROM_DATA = ("eva", "lora_ga")
REFUSALS = {  # what a start from data says of it, and how the table calls that
    "adapted layers is linear": "not linear",
    "did not run in the forward": "not called",
    "is quantized, but this start": "quantized",
}
NO_CELL = "-"
ALSO = "; "  # between layers, and between variants, that fare alike


Label = tuple[str, str]  # variant, layer
Cells = tuple[str, ...]  # of the columns after these two


@dataclass(frozen=True)
class Row:
    """A model, an input for it, and options; of several values of init_lora_weights all must fare alike.

    Attributes:
        plain: the same model with plain weights, where these are quantized.
        at_peft: the same model for peft, which knows its layers by their classes alone.
        theirs: peft's options where they are others; None where peft has no such adapter.
        method: peft's config of other adapters than LoRA, of which `theirs` are all options.
    """

    layer: str
    build: Callable[[], Any]
    x: Callable[[], torch.Tensor]
    options: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["inner"]})
    variant: str = "LoRA"
    plain: Callable[[], Any] | None = None
    at_peft: Callable[[], Any] | None = None
    theirs: dict[str, Any] | None = field(default_factory=dict)
    method: Callable[..., Any] = peft.LoraConfig

    @property
    def label(self) -> Label:
        return self.variant, self.layer


def floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(2))


def rows(*shape: int, of: int = 11) -> Callable[[], torch.Tensor]:
    return lambda: torch.arange(torch.Size(shape).numel()).remainder(of).view(shape)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(self.embedding(x))
        return result


class Readers(nn.Module):
    """Reads the weight of its layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.linear.weight, self.linear.bias)


def experts_of_transformers() -> Any:
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("before transformers 5 each expert has layers of its own")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    return Logits(transformers.MixtralForCausalLM(config))


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(input_ids=x).logits
        return result


def inner(build: Callable[[], nn.Module]) -> Callable[[], Any]:
    return lambda: Model(build())


STARTS = {"target_modules": ["inner"], "init_lora_weights": "pissa"}
RSLORA = {"use_rslora": True, "r": 4, "lora_alpha": 3}
EVA, GA = STARTS | {"init_lora_weights": "eva"}, STARTS | {"init_lora_weights": "lora_ga"}
BOTH = STARTS | {"init_lora_weights": FROM_DATA}
PLUS = "LoRA+"  # an optimizer's groups, no option of the adapter
LOHA = {"target_modules": ["inner"], "variant": "loha"}
OF_METHOD = {"r": 2, "target_modules": ["inner"], "init_weights": False}  # peft's options
DORA = {"target_modules": ["inner"], "use_dora": True}
PARTS = {"target_modules": ["inner"], "enable_lora": {"inner": [True, False, True]}}
QUANTIZED = {
    "bitsandbytes nf4": "nf4",
    "bitsandbytes nf4, double quantization": "nf4 nested",
    "bitsandbytes fp4": "fp4",
    "bitsandbytes int8": "int8",
    "torchao int8": "Int8WeightOnlyConfig",
    "torchao intx": "IntxWeightOnlyConfig",
    "torchao float8": "Float8WeightOnlyConfig",
}
OF_EACH = ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8"]


def parameters(*names: str) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": list(names)}


ROWS = [
    Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8)),
    Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8), {"target_modules": ["inner"], **RSLORA}, "rsLoRA"),
    *(
        Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8), STARTS | {"init_lora_weights": init}, variant)
        for init, variant in (("pissa", "PiSSA"), ("olora", "OLoRA"))
    ),
    *(
        Row(layer, inner(build), x, STARTS | others, "PiSSA", theirs=theirs)
        for layer, build, x, others, theirs in (
            ("transformers' Conv1D", lambda: Conv1D(6, 8), floats(3, 8), {}, {"fan_in_fan_out": True}),
            (
                "nn.Linear, fused",
                lambda: nn.Linear(8, 12),
                floats(3, 8),
                {"enable_lora": {"inner": [True, False, True]}},
                None,
            ),
            ("nn.Embedding", lambda: nn.Embedding(11, 6), rows(3, 5), {}, None),
            ("nn.Conv2d", lambda: nn.Conv2d(8, 6, 3, padding=1), floats(2, 8, 5, 5), {}, None),
            ("nn.MultiheadAttention", Attention, floats(2, 4, 8), {"target_modules": ["attention"]}, None),
            ("nn.LSTM", lambda: Recurrent(nn.LSTM), floats(2, 4, 5), parameters("weight_ih_l0", "weight_hh_l0"), None),
            ("experts, a stack of your own", Experts, floats(2, 4, 5), parameters("gate_up_proj", "down_proj"), None),
        )
    ),
    *(
        Row(layer, inner(build), x, options, variant, theirs=theirs)
        for layer, build, x, theirs in (
            ("nn.Linear", lambda: nn.Linear(8, 6), floats(3, 8), {}),
            ("transformers' Conv1D", lambda: Conv1D(6, 8), floats(3, 8), {"fan_in_fan_out": True}),
        )
        for options, variant in ((EVA, "EVA"), (GA, "LoRA-GA"))
    ),
    Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8), EVA | {"use_dora": True}, "DoRA with EVA"),
    *(
        Row("nn.Linear, whose weight is read", inner(Readers), floats(3, 8), options, variant, theirs=None)
        for options, variant in (
            (EVA | {"target_modules": ["linear"]}, "EVA"),
            (GA | {"target_modules": ["linear"]}, "LoRA-GA"),
        )
    ),
    *(
        Row(
            "nn.MultiheadAttention",
            inner(Attention),
            floats(2, 4, 8),
            options | {"target_modules": ["attention"]},
            variant,
            theirs=None,
        )
        for options, variant in ((EVA, "EVA"), (GA, "LoRA-GA"))
    ),
    *(
        Row(
            "nn.Embedding, with nn.Linear",
            inner(Table),
            rows(3, 5),
            options | {"target_modules": ["embedding", "linear"]},
            variant,
        )
        for options, variant in ((EVA, "EVA"), (GA, "LoRA-GA"))
    ),
    *(
        Row(layer, inner(build), x, BOTH | others, "EVA, LoRA-GA", theirs=None)
        for layer, build, x, others in (
            ("nn.Linear, fused", lambda: nn.Linear(8, 12), floats(3, 8), PARTS),
            ("nn.Embedding", lambda: nn.Embedding(11, 6), rows(3, 5), {}),
            ("nn.Conv2d", lambda: nn.Conv2d(8, 6, 3, padding=1), floats(2, 8, 5, 5), {}),
            ("nn.LSTM", lambda: Recurrent(nn.LSTM), floats(2, 4, 5), parameters("weight_ih_l0", "weight_hh_l0")),
            ("experts, a stack of your own", Experts, floats(2, 4, 5), parameters("gate_up_proj", "down_proj")),
        )
    ),
    Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8), variant=PLUS),
    Row("nn.Linear, fused", inner(lambda: nn.Linear(8, 12)), floats(3, 8), PARTS, "enable_lora", theirs=None),
    Row("nn.Linear, whose weight is read", inner(Readers), floats(3, 8), {"target_modules": ["linear"]}, theirs=None),
    Row("transformers' Conv1D", inner(lambda: Conv1D(6, 8)), floats(3, 8), theirs={"fan_in_fan_out": True}),
    Row("nn.Embedding", inner(lambda: nn.Embedding(11, 6)), rows(3, 5)),
    Row(
        "nn.Embedding, some rows",
        inner(Table),
        rows(3, 5),
        {"target_modules": ["linear"], "trainable_token_indices": {"embedding": [1, 4]}},
        "trainable_token_indices",
    ),
    Row("nn.Conv1d", inner(lambda: nn.Conv1d(8, 6, 3)), floats(2, 8, 7)),
    Row("nn.Conv2d", inner(lambda: nn.Conv2d(8, 6, 3, padding=1)), floats(2, 8, 5, 5)),
    Row("nn.Conv3d", inner(lambda: nn.Conv3d(4, 6, 2)), floats(2, 4, 4, 4, 4)),
    Row("nn.Conv2d, groups", inner(lambda: nn.Conv2d(8, 12, 3, groups=2)), floats(2, 8, 5, 5)),
    Row("nn.Linear", inner(lambda: nn.Linear(8, 6)), floats(3, 8), DORA, "DoRA"),
    Row(
        "transformers' Conv1D", inner(lambda: Conv1D(6, 8)), floats(3, 8), DORA, "DoRA", theirs={"fan_in_fan_out": True}
    ),
    Row("nn.Embedding", inner(lambda: nn.Embedding(11, 6)), rows(3, 5), DORA, "DoRA"),
    Row("nn.Conv1d", inner(lambda: nn.Conv1d(8, 6, 3)), floats(2, 8, 7), DORA, "DoRA"),
    Row("nn.Conv2d", inner(lambda: nn.Conv2d(8, 6, 3, padding=1)), floats(2, 8, 5, 5), DORA, "DoRA"),
    Row("nn.Conv3d", inner(lambda: nn.Conv3d(4, 6, 2)), floats(2, 4, 4, 4, 4), DORA, "DoRA"),
    Row("nn.Conv2d, groups", inner(lambda: nn.Conv2d(8, 12, 3, groups=2)), floats(2, 8, 5, 5), DORA, "DoRA"),
    Row(
        "nn.Linear, whose weight is read",
        inner(Readers),
        floats(3, 8),
        {"target_modules": ["linear"], "use_dora": True},
        "DoRA",
        theirs=None,
    ),
    *(
        Row(layer, inner(build), x, LOHA, "LoHa", theirs=OF_METHOD | {"alpha": 3}, method=peft.LoHaConfig)
        for layer, build, x in (
            ("nn.Linear", lambda: nn.Linear(8, 6), floats(3, 8)),
            ("nn.Conv1d", lambda: nn.Conv1d(8, 6, 3), floats(2, 8, 7)),
            ("nn.Conv2d", lambda: nn.Conv2d(8, 6, 3, padding=1), floats(2, 8, 5, 5)),
            ("nn.Conv2d, groups", lambda: nn.Conv2d(8, 12, 3, groups=2), floats(2, 8, 5, 5)),
        )
    ),
    Row("nn.MultiheadAttention", inner(Attention), floats(2, 4, 8), {"target_modules": ["attention"]}),
    Row(
        "nn.MultiheadAttention, q, k and v apart",
        inner(lambda: Attention(kdim=6, vdim=5)),
        floats(2, 4, 8),
        {"target_modules": ["attention"]},
        theirs=None,
    ),
    Row("nn.LSTM", inner(lambda: Recurrent(nn.LSTM)), floats(2, 4, 5), parameters("weight_ih_l0", "weight_hh_l0")),
    Row("nn.GRU", inner(lambda: Recurrent(nn.GRU)), floats(2, 4, 5), parameters("weight_ih_l0", "weight_hh_l0")),
    Row("experts of transformers", experts_of_transformers, rows(2, 6, of=32), parameters("gate_up_proj", "down_proj")),
    Row("experts, a stack of your own", inner(Experts), floats(2, 4, 5), parameters("gate_up_proj", "down_proj")),
    Row("experts, transposed", inner(lambda: Experts(True)), floats(2, 4, 5), parameters("down_proj")),
    Row("any nn.Parameter of two dimensions", inner(Projected), floats(2, 4, 5), parameters("projection")),
    *(
        Row(
            "linear of another library",
            inner(lambda: OtherLinear.of(nn.Linear(8, 6))),
            floats(3, 8),
            options,
            variant,
            at_peft=inner(lambda: nn.Linear(8, 6)),
        )
        for options, variant in (
            ({"target_modules": ["inner"]}, "LoRA"),
            (RSLORA | {"target_modules": ["inner"]}, "rsLoRA"),
            (EVA, "EVA"),
        )
    ),
    *(
        Row(
            f"linear, {label}",
            lambda kind=kind: Model(quantize_(network(), kind)),
            lambda: inputs(4).requires_grad_(),  # else bitsandbytes packs weights for an evaluation in bfloat16
            {"target_modules": ["0", "2", "4"], **others},
            variant,
            plain=lambda: Model(network()),
            theirs=None if variant == "LoRA-GA" else {},
        )
        for others, variant, labels in (
            ({}, "LoRA", list(QUANTIZED)),
            ({"init_lora_weights": "eva"}, "EVA", OF_EACH),
            ({"init_lora_weights": "lora_ga"}, "LoRA-GA", OF_EACH),
        )
        for label, kind in QUANTIZED.items()
        if label in labels
    ),
]


def fresh(row: Row, *, at_peft: bool = False) -> Any:
    torch.manual_seed(3)
    return ((row.at_peft if at_peft else None) or row.build)().eval()


def adapted(row: Row) -> Any:
    model = fresh(row)
    inject(model, LoRAConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False} | row.options), seed=4)
    if is_from_data(row):
        before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
        initialize_from_data(model, [row.x()] * 3, loss)
        assert not all(torch.equal(value, before[name]) for name, value in adapter_state_dict(model).items())
        assert torch.equal(model(row.x()), fresh(row)(row.x()))
    move_(model, row)
    assert (model(row.x()) - fresh(row)(row.x())).abs().max() > LEAST
    return model


def is_from_data(row: Row) -> bool:
    return row.options.get("init_lora_weights") in FROM_DATA


def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(x).square().mean()
    return result


def move_(model: Any, row: Row) -> None:
    """Let an adapter that starts without effect have one, and one from data or of LoRA+ be trained."""
    if is_from_data(row) or row.variant == PLUS:
        train_(model, row)
    elif "init_lora_weights" in row.options:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))


def train_(model: Any, row: Row) -> list[float]:
    """Train some steps, with the groups of LoRA+ where the row is of that; return the losses."""
    optimizer: torch.optim.Optimizer
    if row.variant != PLUS:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    elif isinstance(model, peft.PeftModel):
        optimizer = create_loraplus_optimizer(model, torch.optim.Adam, lr=0.005, loraplus_lr_ratio=4)
    else:
        optimizer = torch.optim.Adam(lora_param_groups(model, lr=0.005, lr_ratio=4))
    losses = []
    for _ in range(8):
        value = loss(model, row.x())
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def base_bits(model: Any) -> list[bytes]:
    names = {f"{name}" for name, _ in model.named_parameters() if "lora_" not in name}
    state = {name: value for name, value in model.state_dict().items() if name in names}
    plain = [v.contiguous().view(torch.uint8).numpy().tobytes() for v in state.values() if type(v) is torch.Tensor]
    return [*plain, *packed_bits(model)]


def trained(row: Row) -> str:
    """Every factor moves, the loss falls, and the base stays, and what the factors started from."""
    model = adapted(row)
    before, bits = {n: v.clone() for n, v in adapter_state_dict(model).items()}, base_bits(model)
    losses = train_(model, row)
    now = adapter_state_dict(model)
    moved = [torch.equal(now[n], value) != model.get_parameter(n).requires_grad for n, value in before.items()]
    return RIGHT if all(moved) and losses[-1] < losses[0] and base_bits(model) == bits else "wrong"


def merging(row: Row) -> str:
    """Merged outputs are the factored ones, and every bit comes back."""
    model = adapted(row)
    bits, factored = base_bits(model), model(row.x())
    for _ in range(3):
        merge(model)
        torch.testing.assert_close(model(row.x()), factored, **CLOSE)
        whole = [layer.lora.undo is not None for layer in adapted_layers(model).values()]
        unmerge(model)
        assert base_bits(model) == bits
    return "exact" if all(whole) else "stays factored" if not any(whole) else "in part"


def require(reason: str, error: LoRAError) -> None:
    """What is refused says why."""
    if reason not in str(error):
        raise error


def plain_weights(row: Row) -> str:
    """What merged_state_dict gives is a plain model that computes the same."""
    model, cell = adapted(row), RIGHT
    try:
        state = merged_state_dict(model)
    except LoRAError as error:
        if row.at_peft is not None:
            require("whose weight only its own forward reads", error)
            return "refused"
        require("dequantize", error)
        state, cell = merged_state_dict(model, dequantize=torch.float32), "with `dequantize`"
    net = (row.plain or row.build)().eval()
    net.load_state_dict(state)
    # bitsandbytes' and torchao's own forwards are exact to rounding of the scales.
    torch.testing.assert_close(net(row.x()), model(row.x()), **({"rtol": 1e-2, "atol": 1e-2} if row.plain else CLOSE))
    return cell


def adapter_alone(row: Row) -> str:
    model, again = adapted(row), fresh(row)
    inject(again, LoRAConfig(**{"r": 2, "lora_alpha": 3} | row.options), seed=5)
    load_adapter(again, adapter_state_dict(model))
    return RIGHT if torch.equal(again(row.x()), model(row.x())) else "wrong"


def to_peft(row: Row, folder: Path) -> str:
    model = adapted(row)
    try:
        save_adapter(model, folder)
    except LoRAError as error:
        require("PEFT", error)
        return "refused"
    read = peft.PeftModel.from_pretrained(fresh(row, at_peft=True), folder).eval()
    if torch.equal(read(row.x()), fresh(row)(row.x())):
        return "written; peft ignores it"
    torch.testing.assert_close(read(row.x()), model(row.x()), **CLOSE)
    return RIGHT


def peft_model(row: Row, config: peft.LoraConfig) -> Any:
    """As peft adapts the model, from data where the row says so."""
    model, init = fresh(row, at_peft=True), getattr(config, "init_lora_weights", False)
    for module in model.modules():
        if hasattr(module, PACKS_FOR_CPU):  # peft evaluates the model first, and a packed weight gives no gradient
            setattr(module, PACKS_FOR_CPU, False)
    if init == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        preprocess_loraga(model, config, lambda: loss(model, row.x()).backward())  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
    theirs = peft.get_peft_model(model, config)
    if init == "eva":
        nothing: dict[str, Any] = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
        batches, forward = [row.x()] * 3, lambda m, x: m(x)
        initialize_lora_eva_weights(theirs, batches, forward_fn=forward, show_progress_bar=False, **nothing)
    return theirs


def from_peft(row: Row, folder: Path) -> str:
    if row.theirs is None:
        return "not in PEFT"
    options = {name: value for name, value in row.options.items() if name != "enable_lora"}
    if options.get("init_lora_weights") == "eva":
        options["eva_config"] = peft.EvaConfig(rho=1.0)
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options | row.theirs
    config = row.method(**options if row.method is peft.LoraConfig else row.theirs)
    theirs = peft_model(row, config)
    if "parameters" in str(list(row.options)):  # peft draws no B of a parameter
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    initial = {}
    if getattr(config, "init_lora_weights", False) not in (
        False,
        "eva",
    ):  # it changes the base; peft takes that out again when it saves
        own, theirs.peft_config["default"].init_lora_weights = row.options["init_lora_weights"], True
        theirs.save_pretrained(folder / "initial")
        theirs.peft_config["default"].init_lora_weights = own
        initial = {"path_initial_model_for_weight_conversion": str(folder / "initial")}
    move_(theirs, row)
    theirs.eval().save_pretrained(folder, **initial)
    expected = theirs(row.x()).detach()
    assert (expected - fresh(row)(row.x())).abs().max() > LEAST
    if set(load_file(folder / "adapter_model.safetensors")) != set(peft.get_peft_model_state_dict(theirs)):
        return "peft leaves layers out"
    model = fresh(row)
    try:
        load_adapter(model, folder)
    except LoRAError as error:
        require("crosses the groups", error)
        return "refused"
    torch.testing.assert_close(model(row.x()), expected, **CLOSE)
    return RIGHT


def cells(row: Row, folder: Path) -> Cells:
    try:
        adapted(row)
    except LoRAError as error:
        reason = next((short for said, short in REFUSALS.items() if said in str(error)), None)
        if reason is None or not is_from_data(row):
            raise
        return (f"refused: {reason}", *[NO_CELL] * 3)
    assert trained(row) == adapter_alone(row) == RIGHT
    return merging(row), plain_weights(row), to_peft(row, folder / "ours"), from_peft(row, folder / "theirs")


def line(row: Row, folder: Path) -> Cells:
    init = row.options.get("init_lora_weights")
    inits = init if isinstance(init, tuple) else None
    runs = [replace(row, options=row.options | {"init_lora_weights": each}) for each in inits] if inits else [row]
    try:
        found = [cells(run, folder / str(i)) for i, run in enumerate(runs)]
        assert found == found[:1] * len(found)
    except AssertionError as error:
        raise AssertionError(row.label) from error
    return found[0]


def rendered(outcomes: dict[Label, Cells]) -> str:
    """The table: a line for all layers of a variant that fare alike, and for all variants with the same such layers."""
    layers: dict[tuple[str, Cells], list[str]] = {}
    for variant in dict.fromkeys(row.variant for row in ROWS):
        for row in ROWS:
            if row.variant == variant:
                layers.setdefault((variant, outcomes[row.label]), []).append(row.layer)
    variants: dict[tuple[str, Cells], list[str]] = {}
    for (variant, found), alike in layers.items():
        variants.setdefault((ALSO.join(alike), found), []).append(variant)
    lines = [[ALSO.join(alike), names, *found] for (names, found), alike in variants.items()]
    return "\n".join([*HEAD, *(f"| {' | '.join(entries)} |" for entries in lines)])


def table() -> str:
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


def known() -> dict[Label, Cells]:
    lines = [entry.strip("| ").split(" | ") for entry in table().splitlines()[len(HEAD) :]]
    return {
        (variant, layer): tuple(found)
        for variants, layers, *found in lines
        for variant in variants.split(ALSO)
        for layer in layers.split(ALSO)
    }


@pytest.mark.slow
def test_every_layer_and_variant_fares_as_the_table_says(tmp_path):
    found, skipped = {}, []
    for i, row in enumerate(ROWS):
        try:
            found[row.label] = line(row, tmp_path / str(i))
        except pytest.skip.Exception:  # a package that is not installed
            skipped.append(row.label)
    if os.environ.get("WRITE_TABLE"):
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{rendered(known() | found)}\n\n{END}{rest.split(END)[1]}")
    wanted = known()
    assert found == {label: wanted[label] for label in found}
    assert len(found) + len(skipped) == len(ROWS)


def test_the_table_has_each_row_once_and_joins_those_that_fare_alike():
    assert set(known()) == {row.label for row in ROWS}
    assert table() == rendered(known())


def test_a_row_of_a_model_that_does_not_train_says_so(monkeypatch):
    """The table is no list of promises: a layer that is cut off fares otherwise."""
    row = ROWS[0]
    whole = fresh(row)
    monkeypatch.setattr(type(whole), "forward", lambda self, x: self.inner(x).detach().requires_grad_())
    assert trained(row) == "wrong"
    assert copy.deepcopy(row) == row

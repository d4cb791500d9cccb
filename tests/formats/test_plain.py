"""The plain form: what every server takes, with the same outputs, or refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    LoRAConfig,
    LoRAError,
    adapter_state_dict,
    export_adapter,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
    take_adapter,
)
from lightning_lora.nn.adapted_module import adapted_layers
from support.models.networks import checkpoint
from support.models.peers import TENSORS, Fused, close, config_of, fill_, logits, ours, read_by_peft, seeded, theirs
from support.runs.notices import quiet_peers

pytestmark = quiet_peers
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


class Net(nn.Module):
    """Two layers of one last segment, of which one is left alone, and a name that is another's suffix."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12)
        self.body = nn.ModuleDict({"v": nn.Linear(12, 24), "q": nn.Linear(12, 12), "sub": nn.Linear(24, 24)})
        self.rest = nn.ModuleDict({"v": nn.Linear(24, 24, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.rest["v"](self.body["sub"](self.body["v"](self.body["q"](self.q(x))).tanh()))
        return result


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)
        self.register_buffer("order", torch.arange(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.conv(x.view(2, 3, 2, 2)).flatten(2).transpose(1, 2)
        result: torch.Tensor = self.head(rows + self.mha(rows, rows, rows)[0])
        return result


TARGETS = ["q", "body.v"]
OPTIONS: dict[str, dict[str, Any]] = {
    "both patterns": {"rank_pattern": {"^q": 1}, "alpha_pattern": {"body.v": 5}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"body.v": 2}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA and rsLoRA": {"init_lora_weights": "olora", "use_rslora": True},
    "a fused projection": {"enable_lora": {"body.v": [True, False, True]}},
    "LoHa": {"variant": "loha", "r": 3, "target_modules": r"(body\.)?q|body\.v"},
}


def adapted(build: Any, **options: Any) -> nn.Module:
    net = seeded(build)
    inject(net, LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options}))
    return fill_(net)


def assert_same_outputs(build: Any, folder: Path, net: nn.Module, x: torch.Tensor) -> None:
    """Those of the folder in peft and here."""
    with torch.no_grad():
        torch.testing.assert_close(peft.PeftModel.from_pretrained(seeded(build), folder)(x), net(x), **EXACT)
        load_adapter(again := seeded(build), folder)
        torch.testing.assert_close(again(x), net(x), **EXACT)


def assert_plain(path: Path) -> int:
    """The rules of the form, read in the files. Returns the one rank."""
    options, tensors = config_of(path), load_file(path / TENSORS)
    assert isinstance(options["target_modules"], list)
    assert options["lora_alpha"] == options["r"]
    absent = "rank_pattern alpha_pattern use_rslora use_dora modules_to_save target_parameters layers_to_transform"
    for name in (*absent.split(), "layers_pattern", "trainable_token_indices"):
        assert not options.get(name), name
    assert (options["peft_type"], options["bias"], options["init_lora_weights"]) == ("LORA", "none", True)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight", "embedding_A", "embedding_B")) for name in tensors)
    ranks = {tensor.shape[0 if "_A" in name else 1] for name, tensor in tensors.items()}
    assert ranks == {options["r"]}
    rank: int = options["r"]
    return rank


@pytest.mark.parametrize("case", OPTIONS)
def test_plain_folder_gives_the_same_outputs_in_peft_and_here(tmp_path, case: str):
    net, x = adapted(Net, **OPTIONS[case]), torch.randn(5, 12)
    written = export_adapter(take_adapter(net), tmp_path, plain=True)
    expected = {"PiSSA": 8, "OLoRA and rsLoRA": 8, "a fused projection": 8, "LoHa": 9}
    assert assert_plain(tmp_path) == expected.get(case, 4) == written.config.r
    options = config_of(tmp_path)
    assert (options["target_modules"], options["exclude_modules"]) == (["q", "v"], ["rest.v"])
    assert_same_outputs(Net, tmp_path, net, x)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-embedding", {"bias": "none"}),
        ("llama", {"bias": "lora_only", "layers_to_transform": [1], "layers_pattern": "layers"}),  # it has no biases
        ("gpt2", {"rank_pattern": {"c_proj": 6}}),
    ],
)
def test_plain_folder_of_a_transformers_model_gives_the_same_logits_in_peft(tmp_path, name: str, options: Any):
    net = ours(name, tmp_path / "own", **options)
    export_adapter(tmp_path / "own", tmp_path / "plain", plain=True)
    assert_plain(tmp_path / "plain")
    torch.testing.assert_close(logits(read_by_peft(name, tmp_path / "plain")), logits(net), **EXACT)
    if "layers_to_transform" in options:
        return
    other = theirs(name, tmp_path / "theirs", **options)  # without a fingerprint nobody knows the other modules
    export_adapter(tmp_path / "theirs", tmp_path / "of theirs", plain=True)
    assert_plain(tmp_path / "of theirs")
    torch.testing.assert_close(logits(read_by_peft(name, tmp_path / "of theirs")), logits(other), **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["conv", "mha", "head"], "alpha_pattern": {"conv": 3}, "rank_pattern": {"conv": 2}},
        {"target_modules": ["conv", "mha.out_proj"]},
        {"target_modules": ["conv", "head"], "variant": "loha", "r": 2},  # whose factors are matrices
    ],
    ids=str,
)
def test_convolutions_and_attention_have_a_plain_form_in_peft(tmp_path, options: dict[str, Any]):
    net = adapted(Image, **options)
    export_adapter(take_adapter(net), tmp_path, plain=True)
    assert assert_plain(tmp_path) == 4
    assert load_file(tmp_path / TENSORS)["base_model.model.conv.lora_A.weight"].dim() == 4
    assert_same_outputs(Image, tmp_path, net, torch.randn(2, 12))


def test_kernel_that_is_not_known_is_an_error(tmp_path):
    adapter = take_adapter(adapted(Image, target_modules=["conv"], variant="loha", r=2))
    with pytest.raises(LoRAError, match=r"^export_adapter: 'conv' is a convolution, and the source does not say how"):
        export_adapter(dataclasses.replace(adapter, fingerprint={}), tmp_path / "plain", plain=True)
    assert not (tmp_path / "plain").exists()


class Suffix(nn.Module):
    """The name of a layer that is left alone is the suffix of one that is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.body = nn.ModuleDict({"q": nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body["q"](self.q(x))
        return result


class Numbered(nn.Module):
    """Another module with the same number has no weights, so that nothing in a file tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4))
        self.second = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (Suffix, ["body.q"]),
        (Numbered, ["first.0"]),
    ],
    ids=["suffix", "numbers"],
)
def test_layers_are_named_in_full_where_last_segments_would_take_other_modules(tmp_path, build: Any, targets: Any):
    net = adapted(build, target_modules=targets, r=2)
    export_adapter(take_adapter(net), tmp_path, plain=True)
    assert (config_of(tmp_path)["target_modules"], config_of(tmp_path)["exclude_modules"]) == (targets, None)
    assert_same_outputs(build, tmp_path, net, torch.randn(3, 4))


class Skips(nn.Module):
    """A projection, and modules without weights in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleDict({"proj": nn.Linear(4, 4)})
        self.two = nn.ModuleDict({"proj": nn.Identity()})
        self.three = nn.ModuleDict({"proj": nn.Sequential(nn.Tanh())})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.three["proj"](self.two["proj"](self.one["proj"](x)))
        return result


def nested() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()))


@pytest.mark.parametrize(
    ("build", "targets", "excluded", "source"),
    [(Skips, ["proj"], ["three.proj", "two.proj"], "folder"), (nested, ["0", "1.1"], ["1.0"], "checkpoint")],
)
def test_modules_without_weights_are_no_targets(
    tmp_path, build: Any, targets: list[str], excluded: list[str], source: str
):
    net, x = adapted(build, target_modules="all-linear", r=2), torch.randn(3, 4)
    save_adapter(net, tmp_path / "saved")
    torch.save(checkpoint(net, "adapter"), tmp_path / "a.ckpt")
    given = tmp_path / ("saved" if source == "folder" else "a.ckpt")
    for plain in (True, False):
        export_adapter(given, tmp_path / "out", plain=plain)
        options = config_of(tmp_path / "out")
        if plain:
            assert (options["target_modules"], options["exclude_modules"]) == (targets, excluded)
        assert_same_outputs(build, tmp_path / "out", net, x)


@pytest.mark.parametrize("plain", [True, False])
def test_attention_of_a_state_dict_is_found_by_its_out_proj(tmp_path, plain: bool):
    net = adapted(Image, target_modules=["mha", "head"])
    factors = {name: value for name, value in adapter_state_dict(net).items() if ".lora_" in name}
    export_adapter(factors, tmp_path, plain=plain, lora_alpha=6)
    assert_same_outputs(Image, tmp_path, net, torch.randn(2, 12))


class Ends(nn.Module):
    """A layer's name is the end of another module's, and that one's of another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.first = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
        self.body = nn.ModuleDict({"q": nn.Linear(4, 4)})
        self.x = nn.ModuleDict({"body": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.x["body"]["q"](self.body["q"](self.first[0](self.q(x))))
        return result


def test_full_name_that_another_module_ends_with_excludes_that_module(tmp_path, recwarn):
    net, x = adapted(Ends, target_modules=["q", "first.0"], exclude_modules=["body.q"], r=2), torch.randn(3, 4)
    export_adapter(take_adapter(net), tmp_path, plain=True)
    options = config_of(tmp_path)
    assert (options["target_modules"], options["exclude_modules"]) == (["q", "first.0"], ["body.q", "x.body.q"])
    assert_same_outputs(Ends, tmp_path, net, x)
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message)]
    adapter = take_adapter(adapted(Ends, target_modules=r"q|x\.body\.q", r=2))  # which no list names alone
    with pytest.raises(LoRAError, match=r"^export_adapter: no list for PEFT names these .* because 'body\.q', which"):
        export_adapter(adapter, tmp_path / "plain", plain=True)
    assert not (tmp_path / "plain").exists()


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.q, self.conv = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 3, groups=2)
        self.stack = nn.ModuleDict({"lstm": nn.LSTM(4, 4)})


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "DoRA": (Net, {"use_dora": True}, "is a DoRA adapter"),
    "biases": (Net, {"bias": "all"}, r"holds '\w.*bias', .* whole"),
    "rows": (
        Table,
        {"target_modules": ["q"], "trainable_token_indices": {"emb": [1]}},
        "holds trained rows of 'emb'",
    ),
    "a parameter": (
        Table,
        {"target_modules": [], "target_parameters": ["lstm.weight_hh_l0"]},
        r"adapts the single parameter 'stack\.lstm\.weight_hh_l0'",
    ),
    "groups": (Table, {"target_modules": ["conv"], "variant": "loha"}, "adapts 'conv', a convolution with groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_that_holds_more_than_factors_of_layers_has_no_plain_form(tmp_path, case: str):
    build, options, match = REFUSED[case]
    adapter = take_adapter(adapted(build, **options))
    with pytest.raises(LoRAError, match=rf"^export_adapter: {match}.*save_merged\(model, path\)"):
        export_adapter(adapter, tmp_path / "plain", plain=True)
    assert not any(tmp_path.iterdir())


def test_factors_of_16_bits_become_float32_so_that_the_scale_rounds_nothing(tmp_path):
    net = adapted(Net, lora_alpha=6, autocast_adapter_dtype=False).bfloat16()
    export_adapter(take_adapter(net), tmp_path, plain=True)
    tensors = load_file(tmp_path / TENSORS)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["base_model.model.q.lora_B.weight"], net.q.lora_B.detach().float() * 1.5)


def test_scale_times_b_beyond_the_dtype_is_refused(tmp_path):
    largest = torch.finfo(torch.float32).max
    factors = {"one.lora_A": torch.ones(2, 4), "one.lora_B": torch.full((3, 2), largest / 2)}
    with pytest.raises(LoRAError, match=r"^export_adapter: the scale 3 times B of 'one' is beyond the range of \w+\."):
        export_adapter(factors, tmp_path / "plain", plain=True, lora_alpha=6)
    assert not (tmp_path / "plain").exists()
    export_adapter(factors, tmp_path / "plain", plain=True, lora_alpha=4)


def test_export_needs_the_lora_alpha_of_a_source_that_stores_none(tmp_path):
    factors = {"one.lora_A": torch.randn(2, 4), "one.lora_B": torch.randn(3, 2)}
    with pytest.raises(LoRAError, match=r"^export_adapter: stores tensors and no options"):
        export_adapter(factors, tmp_path / "folder", plain=True)
    export_adapter(factors, tmp_path / "folder", plain=True, lora_alpha=6)
    torch.testing.assert_close(read_adapter(tmp_path / "folder").factor("one", "lora_B"), factors["one.lora_B"] * 3)
    with pytest.raises(LoRAError, match=r"^export_adapter: lora_alpha must be a number, but it is '6'\.$"):
        export_adapter(factors, tmp_path / "folder", lora_alpha="6")  # type: ignore[arg-type]


# --- vLLM, by its documented rules: it is not run ---


pytestmark = quiet_peers


def vllm_scaling(path: Path, vocabulary: set[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """vLLM's rules for a folder, from its vllm/lora/peft_helper.py, lora_model.py and utils.py; vLLM itself is not run.

    Returns each module's A, B and scaling as vLLM would use them.
    """
    options = config_of(path)
    assert {"r", "lora_alpha", "target_modules"} <= options.keys()
    assert not options.get("modules_to_save")
    assert not options.get("use_dora")
    assert options.get("bias", "none") == "none"
    root = math.sqrt(options["r"]) if options.get("use_rslora") else options["r"]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / TENSORS).items():
        assert name.startswith("base_model.model.")
        parts = name.split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, leaf = ".".join(parts[2:-2]), parts[-2]
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{name} is unsupported LoRA weight"
            module, leaf = ".".join(parts[2:-1]), parts[-1].replace("embedding_", "")
        assert module.rpartition(".")[2] in vocabulary, module
        found.setdefault(module, {})[leaf] = tensor
    return {n: (f["lora_A"], f["lora_B"], options["lora_alpha"] / root) for n, f in found.items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"rank_pattern": None, "alpha_pattern": None, "target_modules": "all-linear", "use_rslora": True}),
        ("llama-embedding", {"bias": "none"}),
    ],
)
def test_peft_folder_keeps_to_the_rules_of_vllm(tmp_path, name: str, options: dict[str, Any]):
    net = ours(name, tmp_path, **options)
    linear = {key.rpartition(".")[2] for key, module in net.named_modules() if isinstance(module, nn.Linear)}
    modules = vllm_scaling(tmp_path, linear | {"embed_tokens"})
    for key, layer in adapted_layers(net).items():
        a, b, scaling = modules.pop(key)
        torch.testing.assert_close(b @ a * scaling, layer.lora_B @ layer.lora_A * layer.lora.spec.scaling)
    assert not modules


def test_vllm_reads_a_fused_adapter_with_one_rank_and_alpha(tmp_path):
    net = seeded(Fused)
    inject(net, LoRAConfig(r=2, lora_alpha=3, target_modules=["qkv"], enable_lora={"qkv": [True, False, True]}))
    save_adapter(fill_(net), tmp_path)
    (a, b, scaling) = vllm_scaling(tmp_path, {"qkv"})["qkv"]
    x = torch.randn(3, 6)
    close(seeded(Fused).qkv(x) + x @ a.T @ b.T * scaling, net.qkv(x))

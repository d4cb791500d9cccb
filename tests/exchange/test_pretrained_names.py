"""Adapters of models whose modules had other names in an earlier transformers, as PEFT loads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, LoRAError, inject, load_adapter, save_adapter
from lightning_lora.exchange.pretrained_names import _renaming
from support.covering import covering
from support.models.peers import TENSORS, close, fill_, seeded
from support.models.peers import model as peer_model
from support.models.pretrained import gemma3, llava, qwen2_vl
from support.runs.notices import TORCH_NOTICES, quiet_peers

pytestmark = [*quiet_peers, *TORCH_NOTICES, pytest.mark.transformers_5]  # older ones have the earlier names

PREFIX = "base_model.model."
TEXT = ("model.language_model.", "language_model.model.")
TOWER = ("model.vision_tower.", "vision_tower.vision_model.")
EARLIER: dict[str, tuple[Callable[[], Any], list[tuple[str, str]]]] = {  # what names begin with now, and did then
    "llava": (llava, [TEXT, TOWER, ("lm_head.", "language_model.lm_head.")]),
    "gemma3": (gemma3, [TEXT, TOWER]),
    "qwen2-vl": (qwen2_vl, [("model.language_model.", "model."), ("model.visual.", "visual.")]),
}
OPTIONS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj", "qkv"]},
    {"target_modules": ["q_proj"], "use_dora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


def build(family: str) -> Any:
    return seeded(EARLIER[family][0])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(3, 9)[None]).logits
    return out


def to_earlier_names(family: str, folder: Path) -> None:
    """Rename the tensors of an adapter's folder."""
    with safe_open(folder / TENSORS, "pt") as file:
        metadata = file.metadata()
    earlier = {}
    for name, tensor in load_file(folder / TENSORS).items():
        bare = name.removeprefix(PREFIX)
        now, then = next((pair for pair in EARLIER[family][1] if bare.startswith(pair[0])), ("", ""))
        earlier[PREFIX + then + bare.removeprefix(now)] = tensor
    assert earlier.keys() != load_file(folder / TENSORS).keys()
    save_file(earlier, folder / TENSORS, metadata)


def theirs(family: str, folder: Path, **options: Any) -> torch.Tensor:
    """Write an adapter of peft under the earlier names, and return what its model gives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        model = fill_(peft.get_peft_model(build(family), peft.LoraConfig(r=4, **options))).eval()
    model.save_pretrained(str(folder))  # type: ignore[operator]
    to_earlier_names(family, folder)
    return logits(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lightning_lora. entries that name nothing")  # a list for all families
@pytest.mark.parametrize(("family", "options"), covering(EARLIER, OPTIONS, meet=1))
def test_an_adapter_under_the_earlier_names_loads_onto_plain_and_injected_models(tmp_path, family, options):
    expected = theirs(family, tmp_path, **options)
    assert (expected - logits(build(family))).abs().max() > 1e-3
    plain = build(family)
    load_adapter(plain, tmp_path)
    close(logits(plain), expected)
    injected = build(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lightning_lora: target_modules: ")
        inject(injected, LoRAConfig(r=4, **options))
    fill_(injected)
    load_adapter(injected, tmp_path)
    close(logits(injected), expected)
    module = nn.ModuleDict({"first": peer_model("bert"), "network": build(family)})
    load_adapter(module, tmp_path)
    close(logits(module["network"]), expected)
    if "rank_pattern" in options:
        return  # whose layers are not those either
    tensors = {name.replace("self_attn", "attention"): t for name, t in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})  # names that no rule knows
    with pytest.raises(LoRAError, match=r"found none"):
        load_adapter(build(family), tmp_path)


def test_peft_loads_it_with_the_same_outputs(tmp_path):
    expected = theirs("gemma3", tmp_path, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        close(logits(peft.PeftModel.from_pretrained(build("gemma3"), tmp_path).eval()), expected)


def test_our_own_folder_under_the_earlier_names_loads_with_all_that_it_holds(tmp_path):
    net = build("llava")
    inject(net, LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights="pissa"))
    fill_(net)
    with torch.no_grad():
        net.lm_head.weight.add_(0.1)
    save_adapter(net, tmp_path / "now")
    for name in ("adapter_config.json", TENSORS):
        (tmp_path / "then").mkdir(exist_ok=True)
        (tmp_path / "then" / name).write_bytes((tmp_path / "now" / name).read_bytes())
    with safe_open(tmp_path / "now" / TENSORS, "pt") as file:
        text = file.metadata()["lightning_lora"]
    for now, then in EARLIER["llava"][1]:
        text = text.replace(f'"{now}', f'"{then}')
    tensors = load_file(tmp_path / "now" / TENSORS)
    text = text.replace('"lm_head"', '"language_model.lm_head"', 1)
    save_file(tensors, tmp_path / "then" / TENSORS, {"format": "pt", "lightning_lora": text})
    to_earlier_names("llava", tmp_path / "then")
    loaded = build("llava")
    load_adapter(loaded, tmp_path / "then")
    close(logits(loaded), logits(net))


def test_names_whose_tensors_are_put_together_in_a_later_transformers_stay():
    """Weights of experts became one stack, so that no name by itself stands for one of them."""
    rename = _renaming(peer_model("mixtral"))
    assert rename is not None
    for name in ("w1", "w2", "w3"):
        earlier = f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"
        assert rename(earlier) == earlier

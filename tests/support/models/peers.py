"""Small models of transformers and of torch, random and never downloaded, adapters on them by peft and by us,
bases as files, and the command as a user calls it.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, merged_state_dict, save_adapter
from lightning_lora.command.main import main
from support.runs.notices import PEER_NOTICES

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class ConvNet(nn.Module):
    """Convolutions of every dimension, BatchNorm, attention, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.three = nn.Conv3d(1, 2, 2)
        self.bn = nn.BatchNorm1d(8)
        self.emb = nn.Embedding(64, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        x = x + self.bn(self.one(x[..., :3].transpose(1, 2))).transpose(1, 2)
        x = x + self.two(x[:, None]).mean((1, 2, 3))[:, None, None]
        x = x + self.three(x[:, None, :, :, None].expand(-1, -1, -1, -1, 3)).mean((1, 2, 3, 4))[:, None, None]
        x = x + self.mha(x, x, x, need_weights=False)[0]
        result: torch.Tensor = self.head(x)
        return result


@dataclass(frozen=True)
class Peer:
    """A model, and options that LoRAConfig and peft's LoraConfig share."""

    build: Callable[[], nn.Module]
    targets: Any
    options: dict[str, Any] = field(default_factory=dict)
    peft_only: dict[str, Any] = field(default_factory=dict)


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, pad_token_id=0))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 3}}
PEERS = {
    "llama": Peer(_llama, ["q_proj", "v_proj", "down_proj"], PATTERNS, {"task_type": "CAUSAL_LM"}),
    "llama-embedding": Peer(_llama, ["embed_tokens", "o_proj"], {"bias": "all"}, {"task_type": "CAUSAL_LM"}),
    "gpt2": Peer(_gpt2, ["c_attn", "c_proj"], {"use_rslora": True}, {"fan_in_fan_out": True}),
    "llama-dora": Peer(_llama, ["q_proj", "embed_tokens"], {"use_dora": True}, {"task_type": "CAUSAL_LM"}),
    "gpt2-dora": Peer(_gpt2, ["c_attn", "c_proj"], {"use_dora": True, "lora_dropout": 0.1}, {"fan_in_fan_out": True}),
    "convolutions-dora": Peer(ConvNet, ["one", "two", "three", "emb"], {"use_dora": True, "modules_to_save": ["head"]}),
    "bert": Peer(
        _bert,
        ["query", "value", "word_embeddings"],
        {"modules_to_save": ["classifier"], "bias": "lora_only", "exclude_modules": ["layer.1.attention.self.value"]},
        {"task_type": "SEQ_CLS"},
    ),
    "mixtral": Peer(_mixtral, r".*self_attn\.(q|k)_proj", {"init_lora_weights": "gaussian"}),
    "convolutions": Peer(ConvNet, ["one", "two", "three", "emb", "mha"], {"modules_to_save": ["head"]}),
}


def model(name: str) -> nn.Module:
    """Build the model, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PEERS[name].build().eval()


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(2))


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = net(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


def distilbert() -> Any:
    """It has a classifier and a pre_classifier."""
    config = transformers.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4)
    return seeded(lambda: transformers.DistilBertForSequenceClassification(config))


def spread_(net: nn.Module) -> None:
    """Fill all trained parameters with random values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def our_config(name: str, **options: Any) -> LoRAConfig:
    peer = PEERS[name]
    return LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": peer.targets, **peer.options, **options})


def ours(name: str, path: Path | None = None, **options: Any) -> nn.Module:
    """Adapt the model with this package and save the adapter at `path`."""
    net = model(name)
    inject(net, our_config(name, **options))
    spread_(net)
    if path is not None:
        save_adapter(net, path)
    return net


def theirs(name: str, path: Path | None = None, **options: Any) -> peft.PeftModel:
    """Adapt the model with peft and save the adapter at `path`."""
    peer = PEERS[name]
    config = {"r": 4, "lora_alpha": 8, "target_modules": peer.targets, **copy.deepcopy(peer.options), **peer.peft_only}
    config |= options
    net = peft.get_peft_model(model(name), peft.LoraConfig(**config))
    spread_(net)
    if path is not None:
        net.save_pretrained(str(path))
    return net.eval()


def read_by_peft(name: str, path: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for notice in PEER_NOTICES:
            message = notice.partition(":")[2]
            warnings.filterwarnings("ignore", message)
        return peft.PeftModel.from_pretrained(model(name), path).eval()


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def config_of(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return result


def edit(path: Path, **options: Any) -> None:
    (path / CONFIG).write_text(json.dumps(config_of(path) | options))


def redescribe(path: Path, **values: Any) -> None:
    """Change what the header of our folder says."""
    with safe_open(path / TENSORS, "pt") as file:
        metadata = file.metadata()
    described = json.dumps(json.loads(metadata["lightning_lora"]) | values)
    save_file(load_file(path / TENSORS), path / TENSORS, metadata | {"lightning_lora": described})


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12)
        self.other = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.other(self.qkv(x).relu())
        return result


def seeded(build: Any, seed: int = 5) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def fill_(net: nn.Module, scale: float = 0.3, seed: int = 4) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return net


# --- bases as files, and the command ---


def base_folder(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the model as a sharded folder with other files beside the weights."""
    model(name).to(dtype).save_pretrained(path, max_shard_size="12KB")  # type: ignore[operator]
    (path / "tokenizer.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "notes.txt").write_text("notes")
    return path


def in_memory(name: str, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    net = model(name).to(dtype)
    load_adapter(net, adapter)
    return merged_state_dict(net)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def call(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run the command, check that it succeeds, and return what it prints."""
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main([str(arg) for arg in args]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err

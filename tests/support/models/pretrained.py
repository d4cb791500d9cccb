"""transformers models from small folders, as users get them from from_pretrained, and LightningModules around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRAConfig, inject
from support.models.peers import SMALL, fill_
from support.runs.training import own_random_stream

LABELS = 3
VISION = {name: size for name, size in SMALL.items() if name != "vocab_size"} | {"image_size": 16, "patch_size": 8}
LAYERS = {"layers": 1, "attention_heads": 4, "ffn_dim": 32}


def save_body(path: Path) -> Path:
    """Save a BERT without a head, as pretrained models are."""
    with own_random_stream(1):
        transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(path)
    return path


def classifier(path: Path, kind: str = "BertForSequenceClassification") -> Any:
    """Build a model for a task around the body in a folder. Its head is drawn from torch's random stream, as usual."""
    return getattr(transformers, kind).from_pretrained(path, num_labels=LABELS)


def bert() -> Any:
    """A model whose files have the names of its modules."""
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def tied_llama() -> Any:
    """A model whose files leave out the output head, which is tied."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, pad_token_id=0))


def llava() -> Any:
    """A model whose files have other names than its modules."""
    text, vision = transformers.LlamaConfig(**SMALL, pad_token_id=0), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=vision))


def dinov2() -> Any:
    """A model whose files hold two projections in one tensor."""
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION, use_swiglu_ffn=True))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


def deit() -> Any:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION))


def detr() -> Any:
    """A model of which some tensors have the names of its modules in its files, and others have not."""
    backbone: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    resnet = transformers.ResNetConfig(**backbone | {"out_features": ["stage2"]})
    options: dict[str, Any] = {"backbone_config": resnet, "d_model": 32, "num_queries": 4, "use_timm_backbone": False}
    options |= {f"{part}_{key}": size for part in ("encoder", "decoder") for key, size in LAYERS.items()}
    config = transformers.DetrConfig(**options)
    return transformers.DetrForObjectDetection(config)


def qwen2_vl() -> Any:
    text = {**SMALL, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3() -> Any:
    """A model whose output head is its embedding."""
    text = transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


class Lit(L.LightningModule):
    """A transformers model behind an attribute, as in most programs."""

    def __init__(self, path: Path | None = None, model: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters({"path": str(path)})
        self.model: Any = classifier(Path(self.hparams["path"])) if model is None else model
        self.model.train()  # from_pretrained leaves eval mode, of which Lightning warns

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first_output: torch.Tensor = self.model(batch[0])[0]
        loss: torch.Tensor = F.mse_loss(first_output, torch.ones_like(first_output))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


def adapted(network: nn.Module, **options: Any) -> Lit:
    """A Lit whose network has an adapter with an effect, on all linear layers unless options say otherwise."""
    module = Lit(model=network)
    inject(module, LoRAConfig(r=2, **{"target_modules": "all-linear"} | options))
    fill_(module)
    return module


def tokens(count: int = 8) -> torch.Tensor:
    with own_random_stream(2):
        return torch.randint(1, SMALL["vocab_size"], (count, 6))


def token_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(tokens()), batch_size=4)


def answer(model: Any) -> torch.Tensor:
    """Return the first output of a transformers model, or of the one in a LightningModule, in evaluation mode."""
    network: Any = model.model if isinstance(model, L.LightningModule) else model
    training = network.training
    with torch.no_grad():
        result: torch.Tensor = network.eval()(tokens())[0]
    network.train(training)
    return result


ROWS = 70  # of 64


def resized(base: Path, seed: int) -> Any:
    """A Llama with larger embeddings, each time with other values in the new rows."""
    net: Any = transformers.LlamaForCausalLM.from_pretrained(base)
    with own_random_stream(seed):
        net.resize_token_embeddings(ROWS, mean_resizing=False)
    return net.eval()


def of_new_rows(net: nn.Module) -> torch.Tensor:
    """Return the outputs for old and new tokens."""
    with torch.no_grad():
        result: torch.Tensor = net(torch.tensor([[1, ROWS - 1, 2, ROWS - 5]])).logits
    return result

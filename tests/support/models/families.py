"""Families of transformers' models, each as a tiny random model with an input of text, images, audio, or several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from support.runs.training import own_random_stream

WORDS = 60
Inputs = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """A class of transformers with a small configuration.

    Attributes:
        model: name of the class. Its `config_class` is the class of the configuration.
        options: of the configuration.
        inputs: arguments of forward.
        generates: whether generate() is tried.
        attention: the implementation of attention, for parts of the model that support only one.
    """

    model: str
    options: dict[str, Any]
    inputs: Inputs
    generates: bool = False
    attention: dict[str, str] = field(default_factory=dict)

    def configuration(self) -> Any:
        """Build a new configuration, because transformers writes into it."""
        return getattr(transformers, self.model).config_class(**copy.deepcopy(self.options))

    def build(self, attention: str | None = None) -> Any:
        """Build the model, always with the same weights, in evaluation mode."""
        with own_random_stream(1):
            chosen: Any = attention if attention is None or not self.attention else {"": attention} | self.attention
            model = getattr(transformers, self.model)._from_config(self.configuration(), attn_implementation=chosen)
            with torch.no_grad():  # norms and biases as if trained, and nothing that is zero
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        return model.eval()


def _draw(draw: Callable[[], dict[str, torch.Tensor]]) -> Inputs:
    def inputs() -> dict[str, torch.Tensor]:
        with own_random_stream(2):
            return draw()

    return inputs


def _tokens() -> torch.Tensor:
    return torch.randint(5, WORDS - 10, (2, 6))


def _pixels(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


text = _draw(lambda: {"input_ids": _tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long)})
image = _draw(lambda: {"pixel_values": _pixels()})
large_image = _draw(lambda: {"pixel_values": _pixels(32)})
audio = _draw(lambda: {"input_values": torch.randn(2, 400)})
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, **SPECIAL, "vocab_size": WORDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
QWEN = {**LLAMA, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BERT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 64, "pad_token_id": 0}
VIT = {**SIZES, "image_size": 16, "patch_size": 8}
DROPLESS = {"layerdrop": 0.0, "mask_time_prob": 0.0, "apply_spec_augment": False}
WAVE = {
    **SIZES,
    **DROPLESS,
    "vocab_size": WORDS,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
D_MODEL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
CLIP_TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}


def causal(name: str, options: dict[str, Any]) -> Family:
    return Family(f"{name}ForCausalLM", options, text, generates=True)


def _text_and_image() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "pixel_values": _pixels()}


def _llava() -> dict[str, torch.Tensor]:
    tokens = _tokens()
    tokens[:, :4] = 58  # one for each patch
    return {"input_ids": tokens, "pixel_values": _pixels(), "attention_mask": torch.ones_like(tokens)}


def _qwen2_vl() -> dict[str, torch.Tensor]:
    tokens = torch.cat([torch.tensor([[57, 58, 59]]), torch.randint(5, 50, (1, 5))], 1)
    patches = torch.randn(4, 3 * 2 * 8 * 8)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": (tokens == 58).int(),
    }


def _whisper() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": _tokens()}


FAMILIES: dict[str, Family] = {
    # text, from left to right
    "llama": causal("Llama", LLAMA),
    "mistral": causal("Mistral", {**LLAMA, "sliding_window": 4}),
    "qwen2": causal("Qwen2", LLAMA),
    "qwen3": causal("Qwen3", QWEN),
    "gemma": causal("Gemma", QWEN),
    "gemma3_text": causal("Gemma3", {**QWEN, "sliding_window": 4}),
    "phi3": causal("Phi3", LLAMA),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL},
        text,
        generates=True,
    ),
    "gpt_neox": causal("GPTNeoX", {**SIZES, **SPECIAL, "vocab_size": WORDS, "max_position_embeddings": 64}),
    "opt": causal(
        "OPT",
        {
            **SPECIAL,
            "vocab_size": WORDS,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": causal("Bloom", {**SPECIAL, "vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": causal(
        "Falcon",
        {**SPECIAL, "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mamba": causal(
        "Mamba", {**SPECIAL, "vocab_size": WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    ),
    # text in, text out
    "t5": Family(
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        _draw(lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens()}),
        generates=True,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {**D_MODEL, **SPECIAL, "vocab_size": WORDS, "max_position_embeddings": 64, "forced_eos_token_id": None},
        _draw(lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens()}),
        generates=True,
    ),
    # text, both ways
    "bert": Family("BertForSequenceClassification", BERT, text),
    "roberta": Family("RobertaForMaskedLM", {**BERT, "pad_token_id": 1}, text),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        text,
    ),
    "deberta-v2": Family(
        "DebertaV2ForSequenceClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32},
        text,
    ),
    "electra": Family("ElectraForTokenClassification", {**BERT, "embedding_size": 16}, text),
    "albert": Family("AlbertForMaskedLM", {**BERT, "embedding_size": 16}, text),
    "xlnet": Family(
        "XLNetForSequenceClassification",
        {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        text,
    ),
    # mixture of experts
    "mixtral": causal("Mixtral", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": causal("Qwen2Moe", {**LLAMA, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": causal("Qwen3Moe", {**QWEN, **EXPERTS, "num_experts": 4}),
    "olmoe": causal("Olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    # image
    "vit": Family("ViTForImageClassification", VIT, image),
    "deit": Family("DeiTForImageClassification", VIT, image),
    "beit": Family("BeitForImageClassification", VIT, image),
    "dinov2": Family("Dinov2ForImageClassification", VIT, image),
    "swin": Family(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        large_image,
    ),
    "convnextv2": Family(
        "ConvNextV2ForImageClassification",
        {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
        large_image,
    ),
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        large_image,
    ),
    "detr": Family(
        "DetrForObjectDetection",
        {
            **D_MODEL,
            "num_queries": 4,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
        },
        large_image,
        attention={"backbone_config": "eager"},
    ),
    # audio
    "wav2vec2": Family("Wav2Vec2ForCTC", WAVE, audio),
    "hubert": Family("HubertForCTC", WAVE, audio),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {
            **D_MODEL,
            **SPECIAL,
            "vocab_size": WORDS,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _draw(_whisper),
        generates=True,
    ),
    # several
    "clip": Family(
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": VIT, "projection_dim": 16},
        _draw(_text_and_image),
    ),
    "siglip": Family(
        "SiglipModel",
        {"text_config": {**CLIP_TEXT, "projection_size": 32}, "vision_config": VIT},
        _draw(_text_and_image),
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "llama"},
            "vision_config": {**VIT, "model_type": "clip_vision_model"},
            "image_token_index": 58,
        },
        _draw(_llava),
        generates=True,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **LLAMA,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": 58,
            "vision_start_token_id": 57,
            "vision_end_token_id": 59,
        },
        _draw(_qwen2_vl),
        generates=True,
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**QWEN, "model_type": "gemma3_text"},
            "vision_config": {**VIT, "model_type": "siglip_vision_model"},
            "image_token_index": 58,
            "mm_tokens_per_image": 4,
        },
        _draw(lambda: _llava() | {"token_type_ids": torch.tensor([[1] * 4 + [0] * 2] * 2)}),
        generates=True,
    ),
    "blip": Family(
        "BlipForConditionalGeneration",
        {"text_config": {**CLIP_TEXT, **SPECIAL, "encoder_hidden_size": 32, "sep_token_id": 2}, "vision_config": VIT},
        _draw(_text_and_image),
        generates=True,
    ),
}

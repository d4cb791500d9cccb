"""VeRA (arXiv:2310.11454): all layers share one pair of random projections, and each layer trains two vectors.

    W' = W + diag(b) @ B[:out] @ diag(d) @ A[:, :in]

A (r, widest in) and B (widest out, r) are drawn once from a seed, the "key", and stay frozen. They are saved with the
adapter, because versions of torch draw different numbers. b starts as zero and d as a small constant. lora_alpha has no
effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import LoRAError
from .low_rank import CONV1D, LINEAR
from .random_stream import stream
from .variant import Acting, Config, Fault, Place, Stored, Variant, Weights

DIAGONAL, ROWS = "lora_vera_d", "lora_vera_b"  # d (r,) and b (out,)
SHARED_A, SHARED_B = "lora_vera_A", "lora_vera_B"
D_INITIAL, KEY = "d_initial", "projection_prng_key"  # own options, with PEFT's names

# Conflicting options.
WITHOUT = ("rank_pattern", "alpha_pattern", "use_rslora", "enable_lora", "target_parameters", "trainable_token_indices")
IN_PEFT = {"lora_dropout": "vera_dropout", "init_lora_weights": "init_weights"}  # PEFT's names of options, by ours
FIELDS = (  # options with the same name in PEFT
    *("r", "target_modules", "modules_to_save", "fan_in_fan_out", "inference_mode", "task_type", D_INITIAL, KEY),
    *("base_model_name_or_path", "revision"),
)


class VeRA(Variant):
    """Each layer trains vectors d and b. All layers share the frozen projections A and B."""

    name, title = "vera", "VeRA"
    trained = (DIAGONAL, ROWS)
    shared = (SHARED_A, SHARED_B)
    scaled = False
    own_options: ClassVar[Mapping[str, Any]] = {D_INITIAL: 0.1, KEY: 0}
    peft_type = "VERA"
    peft_attention = False
    peft_fields, peft_names = FIELDS, IN_PEFT
    peft_leaves: ClassVar[Mapping[str, str]] = {
        "vera_lambda_d": DIAGONAL,
        "vera_lambda_b": ROWS,
        "vera_A": SHARED_A,  # of a live model, in which each layer holds it
        "vera_B": SHARED_B,
    }
    peft_shared: ClassVar[Mapping[str, str]] = {"vera_A": SHARED_A, "vera_B": SHARED_B}

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        return {DIAGONAL: (place.rank,), ROWS: place.matrix_shape()[:1]}

    def start(self, place: Place, weights: Weights) -> dict[str, torch.Tensor]:
        shapes = self.shapes(place)
        if place.init is False:
            d = torch.randn(shapes[DIAGONAL], generator=stream(place.seed), device="cpu")
            return {DIAGONAL: d, ROWS: torch.ones(shapes[ROWS])}
        return {DIAGONAL: torch.full(shapes[DIAGONAL], place.options[D_INITIAL]), ROWS: torch.zeros(shapes[ROWS])}

    def start_shared(self, places: Iterable[Place], seed: int) -> dict[str, torch.Tensor]:
        """Draw A and B as PEFT does: Kaiming-uniform, first A and then B, from one stream seeded with the key."""
        first, *others = places
        sizes = [place.matrix_shape() for place in (first, *others)]
        outputs, inputs = (max(size) for size in zip(*sizes, strict=True))
        draw = stream(first.options[KEY])
        return {SHARED_A: _uniform(first.rank, inputs, draw), SHARED_B: _uniform(outputs, first.rank, draw)}

    def is_initial(self, stored: Stored, place: Place) -> bool | None:
        if place.init is False:
            return None
        return not stored[ROWS].is_meta and not bool(stored[ROWS].any())

    def of_layer(self, stored: Stored, place: Place) -> Stored:
        if not place.shapes:
            raise LoRAError(
                f"{place.name!r}: the file does not hold the number of the layer's inputs, to which VeRA cuts its "
                "shared projections; load the adapter onto its model."
            )
        outputs, inputs = place.matrix_shape()
        return {**stored, SHARED_A: stored[SHARED_A][:, :inputs], SHARED_B: stored[SHARED_B][:outputs]}

    def acting(self, stored: Stored, weight: torch.Tensor | None, scaling: float) -> Acting:
        # Both vectors scale B, so that A is used as it lies, and no gradient of A's size is computed.
        return Acting(stored[SHARED_A], stored[ROWS][:, None] * stored[DIAGONAL] * stored[SHARED_B])

    # --- what it goes with ---

    def conflict(self, config: Config) -> tuple[str, str] | None:
        for option in WITHOUT:
            if getattr(config, option):
                return option, f"left out with {self.option}"
        if config.lora_alpha != type(config).lora_alpha:
            return "lora_alpha", f"left out with {self.option}, which has no scaling"
        if not isinstance(config.init_lora_weights, bool):
            return "init_lora_weights", f"true or false with {self.option}"
        return None

    def problem(self, module: nn.Module, kind: str, config: Config) -> str:
        if kind in (LINEAR, CONV1D):
            return ""
        return f"{self.option} is for linear layers and transformers' Conv1D alone, as in PEFT"

    # --- apart from a model ---

    def rank(self, stored: Stored) -> int:
        return len(stored[DIAGONAL])

    def fault(self, stored: Stored) -> Fault | None:
        for leaf, dimensions in ((DIAGONAL, 1), (ROWS, 1), (SHARED_A, 2), (SHARED_B, 2)):
            if stored[leaf].dim() != dimensions:
                return Fault("a vector" if dimensions == 1 else "a matrix", leaf)
        rank, outputs = len(stored[DIAGONAL]), len(stored[ROWS])
        if len(stored[SHARED_A]) != rank:
            return Fault(f"{rank} rows, as d has values", SHARED_A)
        if stored[SHARED_B].shape[1] != rank or len(stored[SHARED_B]) < outputs:
            return Fault(f"{rank} columns of {outputs} values or more, as d and b have", SHARED_B)
        return None

    # --- in PEFT ---

    def options_to_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        bias = {"lora_only": "vera_only"}.get(options["bias"], options["bias"])
        return {**super().options_to_peft(options), "bias": bias, "save_projection": True}

    def options_from_peft(self, options: Mapping[str, Any]) -> dict[str, Any]:
        found = {**self.own_options, **options}
        if found.pop("save_projection", True) is False:
            raise ValueError(
                "save_projection=False leaves out the projections vera_A and vera_B, and another version of torch may "
                "draw different ones; save the adapter with save_projection=True"
            )
        found["bias"] = {"vera_only": "lora_only"}.get(found.get("bias", "none"), found.get("bias", "none"))
        return super().options_from_peft(found)


def _uniform(rows: int, columns: int, draw: torch.Generator) -> torch.Tensor:
    """Draw a Kaiming-uniform matrix (rows, columns)."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=draw)

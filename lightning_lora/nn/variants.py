"""The lists of layer kinds and of variants: each file here defines some, which are known once it is imported."""

from __future__ import annotations

from . import attention, conv, dora, embedding, linear, loha, lora, starts, token_rows, vera

LAYER_KINDS = (linear, embedding, conv, attention)
VARIANTS = (lora, starts, dora, token_rows, vera, loha)

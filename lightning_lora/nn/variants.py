"""The lists of layer kinds and variants. Importing a file registers the layer kinds and variants that it defines."""

from __future__ import annotations

from . import attention, conv, dora, embedding, foreign_linear, linear, loha, lora, starts, token_rows

LAYER_KINDS = (linear, embedding, conv, attention, foreign_linear)
VARIANTS = (lora, starts, dora, token_rows, loha)

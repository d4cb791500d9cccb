"""The list of variants: each file here defines one, which is known once it is imported."""

from __future__ import annotations

from . import dora, lora, starts, token_rows

FILES = (lora, starts, dora, token_rows)

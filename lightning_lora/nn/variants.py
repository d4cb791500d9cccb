"""The variants. To import a file is to make the variants known that it defines; in which order does not matter."""

from __future__ import annotations

from . import dora as dora
from . import loha as loha
from . import lora as lora
from . import starts as starts
from . import token_rows as token_rows

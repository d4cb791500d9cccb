"""What tests of several rooms share: models and layers with their references, runs of a Trainer, peft's side,
processes and sharded models, negative controls, and the programs that tests start (programs/).

No test lives here, and nothing that a single test file uses alone.
"""

from __future__ import annotations

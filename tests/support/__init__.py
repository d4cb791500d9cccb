"""Helpers that tests of several rooms share: models and layers with their references, runs of a Trainer, peft's side,
processes and sharded models, negative controls, and the programs that tests start (programs/).

There are no tests here. A helper that only one test file uses is in that file.
"""

from __future__ import annotations

"""Helpers that tests of several rooms share. There are no tests here; what one test file uses alone is in that file.

models      models, training, layers, parameters, tables, variants, methods; of other packages: peers, pretrained,
            families, quantised; small ones for costs: llama, scale
runs        runs, lightning_versions, other_name; programs that tests start: programs/, examples
ranks       processes, launched, sharded, sharded_adapters, fsdp1, deepspeed, strategies
files       expected_weights, fuzz_reference
devices     devices, pretend_device, pretend_operators
comparisons pairs, pair_checks, covering, recorders, broken_off; what is no fault of a test: notices, shortcuts
"""

from __future__ import annotations

"""What Lightning, torch, peft and transformers say that is no fault of a test."""

from __future__ import annotations

import os
import warnings

import pytest

# A warning of this package is an error in every test. One of another package is an error in .ci/run alone: a newer
# release must not turn a user's run red.
OUR_WARNINGS = "(lightning_lora|LoRACallback|LoRAMonitor|LoRAWeightAveraging)"
ALL_ARE_ERRORS = os.environ.get("ALL_WARNINGS_ARE_ERRORS") == "1"

# Lightning's advice about the machine or the run, which says nothing about this package: how it begins.
LIGHTNING_NOTICES = (
    "The '.*_dataloader' does not have many workers",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Trying to infer the `batch_size` from an ambiguous collection",
    "The loaded checkpoint was produced with Lightning v.*, which is newer",  # files of earlier tests
)

# Older versions look for their own generator by the garbage collector, which passes over what conftest.py has frozen.
HYPOTHESIS_NOTICE = "It looks like `register_random` was passed an object that could be garbage collected"

# Said by torch 2.6 of its own device meshes and distributed checkpoints.
DISTRIBUTED_NOTICES = (
    "DTensor random operators may not have complete support on cpu",
    "TypedStorage is deprecated.",
    "The `NO_SHARD` sharding strategy is deprecated",
    "FSDP is switching to use `NO_SHARD` instead of ",
    "FSDP with `bf16-true` enables computation in lower precision",
    "Detected an existing checkpoint in ",
    "The dirpath has changed from ",
    "It is recommended to use `self.log",
    r"Found \d+ module\(s\) in eval mode",
    "CUDA is not available or torch_xla is imported. Disabling autocast",
    "Initializing zero-element tensors is a no-op",
    "When saving the DeepSpeed Stage 3 checkpoint, each worker will save a shard",
    "You have overridden `WithLegacyHook.configure_sharded_model` which is deprecated",
)

# torch's compiler and fast path warn of what they do themselves, on models without this package too.
TORCH_NOTICES = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

# What peft and transformers say of each other or of the file's plan, whoever wrote the adapter.
PEER_NOTICES = (
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:Could not find a config file in  - will assume that the vocabulary was not modified",
    "ignore:Could not identify embedding layer.s. because the model is not",
)
quiet_peers = [pytest.mark.filterwarnings(notice) for notice in PEER_NOTICES]


def let_warnings_be_errors() -> None:
    """Turn warnings into errors in a process that a test starts, as pytest does in its own."""
    if ALL_ARE_ERRORS:
        warnings.simplefilter("error")
    else:
        warnings.filterwarnings("error", OUR_WARNINGS)


# A run that evaluates an adapter with its first values, which is no matter of a test about something else.
UNTRAINED_NOTICE = pytest.mark.filterwarnings("ignore:LoRACallback. .* was neither trained nor loaded")

"""FSDP2 over NCCL on two GPUs: each way of sharding by itself, and under a Trainer."""

from distributed.test_sharding import test_sharded_model_merges_as_one_device_and_restores_every_shard  # noqa: F401
from support.devices import two_gpus
from trainer.test_strategies_fsdp2 import alone, test_training_equals_that_on_one_device  # noqa: F401

pytestmark = two_gpus

"""DDP over NCCL on two GPUs."""

from support.devices import two_gpus
from trainer.test_strategies_ddp import *  # noqa: F403

pytestmark = two_gpus

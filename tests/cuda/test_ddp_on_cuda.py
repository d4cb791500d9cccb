"""DDP over NCCL on two GPUs."""

from distributed.test_ddp import *  # noqa: F403
from support.devices import two_gpus

pytestmark = two_gpus

"""What every test needs: one thread for tiny models, a seeded stream, and silence for Lightning's own notices."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI uses what jsonargparse 5 will drop

import hypothesis
import pytest
import torch

# Lightning's advice about the machine or the run, which says nothing about this package.
LIGHTNING_NOTICES = (
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "Checkpoint directory .* exists and is not empty",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Trying to infer the `batch_size`",
)


hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    for message in LIGHTNING_NOTICES:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small weight has several."""
    monkeypatch.setattr("lightning_lora.exact.CPU_BLOCK", 400)

"""What a fit shows and logs at its start."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from lightning_lora import attach, inject, take_adapter
from lightning_lora.adapter.adapter import Adapter
from support.runs.training import Net, make_trainer
from support.runs.with_callback import lora, run


def trained_adapter(seed: int) -> Adapter:
    """An adapter of Net's linear layers that has an effect."""
    inject(model := Net(), lora(r=3, lora_alpha=6, init_lora_weights=False).config, seed=seed)
    return take_adapter(model)


def test_loggers_get_names_and_weights_of_all_that_is_attached(tmp_path: Path):
    attach(model := Net(), trained_adapter(2), name="style", strength=0.5)
    logger = CSVLogger(tmp_path)
    run(make_trainer(tmp_path, lora(attach={"sft": trained_adapter(1)}), logger=logger), "fit", model)
    text = (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert """lora/attach: '{"sft": 1.0, "style": 0.5}'""" in text


def test_summary_at_fit_start_names_them(tmp_path: Path, caplog):
    with caplog.at_level(logging.INFO, "lightning_lora"):
        run(make_trainer(tmp_path, lora(attach={"sft": {"source": trained_adapter(1), "strength": 0.5}})), "fit", Net())
    (shown,) = (record.message for record in caplog.records if "adapted layers" in record.message)
    assert re.search(r"attached +sft \(strength 0\.5\)", shown)
    assert len(shown.splitlines()) <= 10

"""Kills a training process at random moments and resumes it, until it has finished.

    python -m support.runs.programs.killed_runs FOLDER KILLS

Prints as JSON, for each kind of checkpoint, how often it killed, in how many of these a file was being written, and
the epochs it resumed at. The state at the end is in FOLDER/KIND/final.ckpt, that of the same run without kills in
FOLDER/KIND/whole/final.ckpt.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback
from support.runs.training import Data, Net, make_trainer

EPOCHS = 40


class Steady(Net):
    """Its learning rate stays, so that every epoch counts."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def let_writing_take_a_moment() -> None:
    """Pause in the middle of each file, so that a process which waits for it sees it on a busy machine too."""
    opened: Any = importlib.import_module("fsspec.implementations.local").LocalFileOpener
    honest = opened.write

    def write(self: Any, content: bytes) -> Any:
        half = len(content) // 2
        written = honest(self, content[:half])
        time.sleep(0.01)
        return written + honest(self, content[half:])

    opened.write = write


def train(folder: Path, kind: Any) -> None:
    """Goes on from the last checkpoint if there is one."""
    torch.manual_seed(0)
    callbacks = [
        LoRACallback(r=2, save=kind),
        ModelCheckpoint(folder, monitor="step", mode="max", save_last=True, save_top_k=2),
    ]
    trainer = make_trainer(folder, *callbacks, max_epochs=EPOCHS)
    last = folder / "last.ckpt"
    trainer.fit(Steady(width=64), Data(), ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(folder / "final.ckpt")


def started(folder: Path, kind: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, kind)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def wait_for_checkpoint(pid: int, last: Path) -> None:
    """Until the process has saved another checkpoint, or has ended: a machine may become slower at any time."""
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if last.exists() and last.stat().st_mtime_ns != before:
            break
        time.sleep(0.001)


def wait_for_file(folder: Path, limit: float) -> None:
    """Until a file is being written there."""
    until = time.monotonic() + limit
    while time.monotonic() < until and not os.listdir(folder):
        time.sleep(0.001)


def killed(folder: Path, kind: str, kills: int) -> dict[str, Any]:
    tempfile.tempdir = str(folder / "temporary")  # where Lightning writes before it renames
    Path(tempfile.tempdir).mkdir(parents=True)
    whole = folder / "whole"
    begin = time.monotonic()
    train(whole, kind)
    full_time = time.monotonic() - begin
    chance = random.Random(kind)
    resumed, writing = [], 0
    for kill in range(kills):
        pid = started(folder, kind)
        if kill:  # the first one may come before anything is saved
            wait_for_checkpoint(pid, folder / "last.ckpt")
        time.sleep(chance.uniform(0, 1.5 / EPOCHS) * full_time)
        if kill % 2:
            wait_for_file(Path(tempfile.tempdir), 5 / EPOCHS * full_time)
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            break
        half_written = list(Path(tempfile.tempdir).iterdir())
        writing += bool(half_written)
        for file in half_written:
            file.unlink()
        files = {file: torch.load(file, weights_only=True) for file in folder.glob("*.ckpt")}  # each one is whole
        resumed.append(files[folder / "last.ckpt"]["epoch"] if folder / "last.ckpt" in files else None)
    assert os.waitstatus_to_exitcode(os.waitpid(started(folder, kind), 0)[1]) == 0
    return {"kills": len(resumed), "while writing": writing, "resumed at": resumed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    let_writing_take_a_moment()
    found = {kind: killed(Path(sys.argv[1]) / kind, kind, int(sys.argv[2])) for kind in ("adapter", "merged", "full")}
    print(json.dumps(found))

"""SIGKILL at random moments of saving and merging on disk: each file is the old or the complete new one. Signals whose
handlers raise at random moments of merging a model: all of W or all of W'.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import LoRAConfig, inject, is_merged, load_adapter, merge, save_adapter, unmerge
from lightning_lora.command.merge import merge_on_disk

TRIES = 400
WIDTH, LAYERS = 192, 8

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))


def injected(alpha: float) -> nn.Module:
    """Another alpha has other options, other tensors and another merged model."""
    net = network()
    inject(net, LoRAConfig(r=64, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(alpha)
    return net


def files_in(path: Path) -> dict[str, str]:
    """Digests of contents by name; nothing where nothing is."""
    files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def killed(work: Callable[[], object], delay: float | None) -> bool:
    """Run in a child process and kill it after the delay, if there is one; whether it was still at work."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_often(path: Path, works: dict[str, Callable[[], object]], times: int) -> None:
    """Write one result over the other again and again, until enough children were killed at work."""
    complete: dict[str, dict[str, str]] = {}
    durations = []
    for name, work in works.items():
        start = time.perf_counter()
        assert not killed(work, None)  # a child of a large process takes longer than the process itself
        durations.append(time.perf_counter() - start)
        complete[name] = files_in(path)
    old, new = complete.values()
    assert old.keys() == new.keys()
    assert old != new
    moments, window = random.Random(1), 1.5 * max(durations)
    kills = changes = 0
    for attempt in range(TRIES):
        before, work = files_in(path), list(works.values())[attempt % 2]
        was_killed = killed(work, moments.uniform(0, window))
        window *= 1.02 if was_killed else 0.98  # the machine may have become slower or faster
        kills += was_killed
        found = files_in(path)
        assert found.keys() == old.keys()
        assert all(found[file] in (old[file], new[file]) for file in found), f"a file is cut after {kills} kills"
        changes += found != before
        if kills >= times and changes:  # some got through, so that the moments cover the whole run
            break
    assert kills >= times
    assert changes
    assert all(left.name.startswith(f".{path.name}.") for left in set(path.parent.iterdir()) - {path})
    for name, work in works.items():
        work()
        assert files_in(path) == complete[name]


def test_killed_save_adapter_leaves_old_or_new_files(tmp_path: Path) -> None:
    nets = {str(alpha): injected(alpha) for alpha in (1, 2)}
    path = tmp_path / "out" / "adapter"
    path.mkdir(parents=True)
    (path / "README.md").write_text("mine")

    kill_often(path, {name: partial(save_adapter, net, path) for name, net in nets.items()}, 30)
    load_adapter(network(), path)
    assert (path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(("form", "times"), [("folder", 30), ("safetensors", 10), ("torch", 10)])
def test_killed_merge_leaves_old_or_new_files(tmp_path: Path, form: str, times: int) -> None:
    state = network().state_dict()
    suffix = {"folder": "", "safetensors": ".safetensors", "torch": ".pt"}[form]
    base, out = tmp_path / f"base{suffix}", tmp_path / "out" / f"model{suffix}"
    if form == "folder":
        base.mkdir()
        save_file(state, base / "model.safetensors")
        (base / "config.json").write_text("{}")
    elif form == "safetensors":
        save_file(state, base)
    else:
        torch.save(state, base)
    for alpha in (1, 2):
        save_adapter(injected(alpha), tmp_path / str(alpha))

    def work(name: str) -> Callable[[], object]:
        return lambda: merge_on_disk(base, tmp_path / name, out, overwrite=True)

    kill_often(out, {name: work(name) for name in ("1", "2")}, times)


class Stopped(BaseException):
    """What the handlers raise."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def stopped(work: Callable[[], object], number: int, delay: float) -> bool:
    """Do the work, and send a signal after the delay whose handler raises; whether it came out of the work."""
    at_work = True

    def stop(*_: object) -> None:
        if at_work:
            raise Stopped

    before = signal.signal(number, stop)
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    try:
        timer.start()
        work()
        return False
    except Stopped:
        return True
    finally:
        at_work = False
        timer.cancel()
        timer.join()
        signal.signal(number, before)


def stop_often(works: Sequence[Callable[[], object]], times: int, check: Callable[[], None]) -> None:
    """Do one work after the other again and again, until each signal has broken enough of them off."""
    moments, durations = random.Random(3), []
    for work in works:
        start = time.perf_counter()
        work()
        durations.append(time.perf_counter() - start)
    for number in SIGNALS:
        window, stops, whole = 1.5 * max(durations), 0, 0
        for attempt in range(TRIES):
            was_stopped = stopped(works[attempt % len(works)], number, moments.uniform(0, window))
            window *= 1.02 if was_stopped else 0.98
            stops, whole = stops + was_stopped, whole + (not was_stopped)
            check()
            if stops >= times and whole:
                break
        assert stops >= times
        assert whole


@pytest.mark.parametrize("first", [merge, unmerge])
def test_signals_whose_handlers_raise_leave_all_of_w_or_all_of_w_prime(first: Callable[[nn.Module], None]) -> None:
    net = injected(1)

    def weights() -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in net.parameters()]

    plain = weights()
    merge(net)
    whole = weights()
    assert not all(map(torch.equal, plain, whole))

    def work() -> None:
        (merge if first is unmerge else unmerge)(net)
        first(net)

    def check() -> None:
        assert all(map(torch.equal, weights(), whole if is_merged(net) else plain))

    stop_often([work], 10, check)


def test_killed_first_save_leaves_a_complete_result_or_none(tmp_path: Path) -> None:
    net = injected(1)
    save_adapter(net, tmp_path / "whole")
    whole, path = files_in(tmp_path / "whole"), tmp_path / "out" / "adapter"
    moments, kills = random.Random(2), 0
    for _ in range(TRIES):
        kills += killed(lambda: save_adapter(net, path), moments.uniform(0, 0.1))
        assert files_in(path) in ({}, whole)
        shutil.rmtree(path, ignore_errors=True)
        if kills == 10:
            break
    assert kills == 10

"""SIGKILL, and signals whose handlers raise, at random moments of saving and merging: the old or the complete new
result, never a mixture. Raising handlers leave nothing else, and what kills leave is removed by the next writer.
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

from lightning_lora import LoRAConfig, inject, is_merged, load_adapter, merge, save_adapter, save_merged, unmerge
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


def digest(path: Path) -> str:
    """Of all names and contents; '' where there is nothing."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    content = hashlib.sha256()
    for file in files:
        content.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest() if files else ""


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
    complete, durations = {}, []
    for name, work in works.items():
        start = time.perf_counter()
        assert not killed(work, None)  # a child of a large process takes longer than the process itself
        durations.append(time.perf_counter() - start)
        complete[digest(path)] = name
    assert len(complete) == 2
    moments, window = random.Random(1), 1.5 * max(durations)
    kills = changes = 0
    for _ in range(TRIES):
        before = complete[digest(path)]
        other = next(name for name in works if name != before)
        was_killed = killed(works[other], moments.uniform(0, window))
        window *= 1.02 if was_killed else 0.98  # the machine may have become slower or faster
        kills += was_killed
        found = digest(path)
        assert found in complete, f"after {kills} kills {path.name} is neither the old nor the new result"
        changes += complete[found] == other
        if kills >= times and changes:  # some got through, so that the moments cover the whole run
            break
    assert kills >= times
    assert changes
    for left in set(path.parent.iterdir()) - {path}:
        assert left.name.startswith(f".{path.name}.")
        for entry in (left, *left.rglob("*")):
            os.utime(entry, (0, 0))  # as if an hour had passed
    for work in works.values():
        work()
    assert list(path.parent.iterdir()) == [path]


def test_killed_save_adapter_leaves_the_old_or_the_new_folder(tmp_path: Path) -> None:
    nets = {str(alpha): injected(alpha) for alpha in (1, 2)}
    path = tmp_path / "out" / "adapter"
    path.mkdir(parents=True)
    (path / "README.md").write_text("mine")

    kill_often(path, {name: partial(save_adapter, net, path) for name, net in nets.items()}, 50)
    load_adapter(network(), path)
    assert (path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(("form", "times"), [("folder", 50), ("safetensors", 10), ("torch", 10)])
def test_killed_merge_leaves_the_old_or_the_new_result(tmp_path: Path, form: str, times: int) -> None:
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


@pytest.mark.filterwarnings(  # where a handler raises between opening and `with`
    "ignore:unclosed scandir iterator", "ignore:unclosed file <", "ignore:Exception ignored in"
)
@pytest.mark.parametrize("call", ["save_adapter", "save_merged", "merge of a folder", "merge of a state dict"])
def test_signals_whose_handlers_raise_leave_the_old_or_the_new_result_and_nothing_else(
    tmp_path: Path, call: str
) -> None:
    nets = [injected(alpha) for alpha in (1, 2)]
    base, path = tmp_path / "base", tmp_path / "out" / ("model.pt" if "state dict" in call else "model")
    path.parent.mkdir()
    works: list[Callable[[], object]]
    if call.startswith("save"):
        save = save_adapter if call == "save_adapter" else save_merged
        works = [partial(save, net, path) for net in nets]
    else:
        base = base.with_suffix(path.suffix)
        if path.suffix:
            torch.save(network().state_dict(), base)
        else:
            base.mkdir()
            save_file(network().state_dict(), base / "model.safetensors")
        for number, net in enumerate(nets):
            save_adapter(net, tmp_path / str(number))
        works = [partial(merge_on_disk, base, tmp_path / str(number), path, overwrite=True) for number in (0, 1)]
    complete = set()
    for work in works:
        work()
        complete.add(digest(path))
    assert len(complete) == 2

    def check() -> None:
        assert digest(path) in complete
        assert list(path.parent.iterdir()) == [path]

    stop_often(works, 12, check)


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
    whole, path = digest(tmp_path / "whole"), tmp_path / "out" / "adapter"
    moments, kills = random.Random(2), 0
    for _ in range(TRIES):
        kills += killed(lambda: save_adapter(net, path), moments.uniform(0, 0.1))
        assert digest(path) in ("", whole)
        shutil.rmtree(path, ignore_errors=True)
        if kills == 10:
            break
    assert kills == 10

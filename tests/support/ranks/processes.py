"""Groups of processes that stay up between tests, and programs in interpreters of their own, as forks of one."""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import queue
import random
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

BACKEND = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() > 1 else "gloo"
COLLECTIVE_TIMEOUT = 60  # seconds, of which a rank may wait for others on a busy machine
CALLS = 20  # after which a world is started anew: gloo's threads of each group that a test made stay, and take time
LOST_CONNECTION = ("Connection", "Broken pipe")  # gloo's words: closed or reset by the peer, or found broken in a write

for method in ("record_event", "wait_event"):  # FSDP2 calls them on the CPU too, for which torch 2.6 forgot them
    if not hasattr(torch.cpu.Stream, method):
        setattr(torch.cpu.Stream, method, lambda self, *event: None)


class World:
    """A process group of `size` ranks. run() calls a module-level function on each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.calls = 0

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning.pytorch", "torch.distributed.checkpoint"])  # imported once for all
        self.inboxes = [context.Queue() for _ in range(self.size)]
        self.outbox = context.Queue()
        port = free_port()
        self.processes = [
            context.Process(target=_serve, args=(rank, self.size, port, self.inboxes[rank], self.outbox), daemon=True)
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.start()
        self.calls = 0

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Call function(*args) on every rank and return the results by rank. A failure or a hang ends this world."""
        self._send(function, args)
        try:
            return self._collect(time.monotonic() + timeout)
        except BaseException:
            self.stop()  # or the next one would be given what comes late
            raise

    def run_broken(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> dict[int, str]:
        """Call a function that kills ranks or raises, return the traceback of each survivor, and end this world.

        The process of a rank that raised ends, as a program would: so ranks that wait for it learn of the failure.
        """
        self._send(function, args, stays=False)
        deadline = time.monotonic() + timeout
        ended: dict[int, str] = {}
        alive = True
        while alive and time.monotonic() < deadline:
            alive = any(self.processes[rank].is_alive() for rank in range(self.size) if rank not in ended)
            with contextlib.suppress(queue.Empty):  # also what the last one said before it ended
                while len(ended) < self.size:
                    rank, failure, _ = self.outbox.get(timeout=0.2)
                    ended[rank] = failure
        self.stop()
        return ended

    def _send(self, function: Callable[..., Any], args: Any, stays: bool = True) -> None:
        if self.calls == CALLS:
            self.stop()
        self.calls += 1
        if not self.processes:
            self.start()
            self._collect(time.monotonic() + 200)  # imports of all packages
        for inbox in self.inboxes:
            inbox.put((function, args, stays))

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            try:
                rank, failure, result = self.outbox.get(timeout=max(0.01, min(1, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() < deadline and all(process.is_alive() for process in self.processes):
                    continue
                self.stop()
                pytest.fail(f"of {self.size} ranks only {sorted(results)} came back")
            if failure:
                self.stop()
                pytest.fail(f"rank {rank}:\n{failure}")
            results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


_WORLDS: dict[int, World] = {}


def world(size: int = 2) -> World:
    """Return the one world of this size. Its processes end when this process ends."""
    return _WORLDS.setdefault(size, World(size))


@atexit.register
def _stop() -> None:
    """Kill them: they would outlive SIGTERM, by a handler that Lightning leaves where a fit ends by two exceptions."""
    for each in _WORLDS.values():
        each.stop()


def free_port() -> int:
    """Find a port that is still free when it is used, seconds later.

    The system gives ports of its own range to any connection, such as those of the other tests that run meanwhile. So
    this one is below that range, and drawn, because several processes look for one.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, _first_port_of_the_system())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _first_port_of_the_system() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 49_152  # by the standard
    return max(first, 11_000)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment variables that Lightning and torch read in processes of a launcher."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }


def _serve(rank: int, size: int, port: int, inbox: Any, outbox: Any) -> None:
    os.environ.update(environment(rank, size, port))
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    quiet()
    if BACKEND == "nccl":
        torch.cuda.set_device(rank)
    of_each_device = "cpu:gloo,cuda:nccl" if BACKEND == "nccl" else BACKEND  # shards may be offloaded to the CPU
    dist.init_process_group(of_each_device, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT))
    outbox.put((rank, "", None))
    stays = True
    while stays:
        function, args, stays = inbox.get()
        try:
            torch.manual_seed(0)
            outbox.put((rank, "", function(*args)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
    outbox.close()
    outbox.join_thread()  # what it holds is on its way
    os._exit(0)  # gloo's threads abort now and then in an orderly exit


def quiet() -> None:
    """Treat warnings as the main process does: our own are errors, and Lightning's notices are ignored."""
    import logging

    import lightning.pytorch  # noqa: F401  (resets its own logger on import)

    from support.runs.notices import DISTRIBUTED_NOTICES, LIGHTNING_NOTICES, let_warnings_be_errors
    from support.runs.shortcuts import seed_without_stack_traces

    seed_without_stack_traces()
    let_warnings_be_errors()
    warnings.filterwarnings("ignore", "lightning_lora. training has changed other adapters")  # as in pyproject.toml
    for message in LIGHTNING_NOTICES:
        warnings.filterwarnings("ignore", message)
    for message in DISTRIBUTED_NOTICES:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


DONE = "done"
PARENT = f"""
import importlib, json, os, sys, traceback, types

def outcome(program):
    read, write = os.pipe()
    if not os.fork():
        found = "{DONE}"
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            exec(program, vars(main))
        except BaseException:
            found = traceback.format_exc()
        os.write(write, found.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = file.read()
    os.wait()
    return found

outcomes = {{}}
for name, (modules, program) in json.loads(sys.argv[1]).items():
    for module in modules:
        importlib.import_module(module)
    outcomes[name] = outcome(program)
print()
print(json.dumps(outcomes))
"""


def run_in_forks(programs: Mapping[str, tuple[list[str], str]]) -> dict[str, str]:
    """Run programs one after the other.

    Args:
        programs: by name, modules to import before the program and its source. Later programs have the modules too.

    Returns:
        By name, DONE, or the traceback, or "" where the program ended at once.
    """
    command = [sys.executable, "-c", PARENT, json.dumps(programs)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    outcomes: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return outcomes

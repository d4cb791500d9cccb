"""Settings of every test: one thread for tiny models, a seeded stream, and silence for Lightning's notices."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI uses what jsonargparse 5 will drop

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("support")  # its assertions show their values

from support.runs import shortcuts  # noqa: E402

shortcuts.read_entry_points_once()
shortcuts.seed_without_stack_traces()

from support.devices.places import DEVICE, NO_GPUS, PLACES, Place  # noqa: E402
from support.runs.launched import launched  # noqa: E402, F401
from support.runs.lightning_versions import HAS_WEIGHT_AVERAGING  # noqa: E402
from support.runs.notices import ALL_ARE_ERRORS, HYPOTHESIS_NOTICE, LIGHTNING_NOTICES  # noqa: E402

# A busy machine is no failure, and what fails here fails everywhere, each time.
hypothesis.settings.register_profile("same everywhere", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same everywhere")
with suppress(ImportError):  # else what happens to be imported before a test lends its constants to the draws
    providers = importlib.import_module("hypothesis.internal.conjecture.providers")
    vars(providers).update(is_local_module_file=lambda path: False)


ON_A_DEVICE = {"a_device", "compiling_device", "devices_of_ranks"}  # fixtures: --device runs the tests that take one

# By these rich takes any output for a terminal, or breaks lines elsewhere.
OF_A_TERMINAL = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=(DEVICE, "cuda"), help="run nothing but tests that take a device, on this one")


def pytest_configure(config: pytest.Config) -> None:
    for name in OF_A_TERMINAL:
        os.environ.pop(name, None)
    if ALL_ARE_ERRORS:
        config.getini("filterwarnings").insert(0, "error")  # the first one gives way to all others
    for message in (*LIGHTNING_NOTICES, HYPOTHESIS_NOTICE):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over files without a test of the core where it alone is run: importing all takes longer than its tests."""
    if config.getoption("markexpr") == "core" and collection_path.match("test_*.py"):
        return "mark.core" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_there = {
        "weight_averaging": HAS_WEIGHT_AVERAGING,
        "transformers_5": int(version("transformers").partition(".")[0]) >= 5,
    }
    lacking = [marker for marker, there in is_there.items() if not there]
    absent = [item for item in items if any(map(item.get_closest_marker, lacking))]
    if config.getoption("device"):
        absent += [item for item in items if not ON_A_DEVICE & {*getattr(item, "fixturenames", ())}]
    if absent:
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


def pytest_collection_finish() -> None:
    shortcuts.let_collections_pass_over_what_is_there()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many damaged inputs the fuzz tests tried, and of how many kinds; from whichever process ran them."""
    reports = [report for report in terminalreporter.stats.get("", []) if getattr(report, "when", "") == "teardown"]
    counts = [count for report in reports for name, count in report.user_properties if name == "inputs"]
    if counts:
        parts = ", ".join(f"{kind} {tried} ({refused} refused)" for kind, tried, refused in counts)
        terminalreporter.write_line(f"fuzz: {sum(tried for _, tried, _ in counts)} inputs: {parts}")


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)  # a test that was broken off inside of no_grad may have left it off
    torch.manual_seed(0)
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = True  # for caplog; not so where pytest sets its handlers up late
    yield
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)  # seed_everything leaves it, and later process groups would reseed by it


@pytest.fixture(autouse=True)
def _handlers_of_signals() -> Iterator[None]:
    """Lightning ignores Ctrl-C after the first one, and leaves its handler of SIGTERM where a run raises."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def as_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program in the test's folder, without arguments of its own: LightningCLI warns where these are passed over."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def a_device(request: pytest.FixtureRequest) -> Place:
    """What makes a device that is not the CPU available inside, and gives its name: a pretended one, or --device."""
    return PLACES[request.config.getoption("device") or DEVICE]


@pytest.fixture
def device(a_device: Place) -> Iterator[str]:
    """The name of that device, which is there for the whole test."""
    with a_device() as name:
        yield name


@pytest.fixture
def compiling_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, or a GPU with --device=cuda: compilers, profilers and packed weights know no pretended device."""
    with PLACES["cuda" if request.config.getoption("device") == "cuda" else "cpu"]() as name:
        yield name


@pytest.fixture
def counted_device() -> Iterator[str]:
    """The pretended device whatever --device says, because it counts what it is asked to do."""
    with PLACES[DEVICE]() as name:
        yield name


@pytest.fixture
def devices_of_ranks(request: pytest.FixtureRequest) -> None:
    """What several ranks run on: a GPU each where there are two, or else the CPU."""
    if request.config.getoption("device") == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(NO_GPUS)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small weight has several."""
    monkeypatch.setattr("lightning_lora.nn.exact_merge.CPU_CHUNK", 400)

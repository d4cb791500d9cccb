"""Each example runs as its user runs it, and prints what the README shows. For digits see test_digits_example.py."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from support.runs.examples import COMMANDS, ROOT, SHOWN, assert_alike, checkout, numbers, run

BESIDE = "small_models"  # what the examples import: models and texts that stand in for those of a hub
FILES = {path.stem: path.read_text() for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != BESIDE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory)


def check_finetune(printed: str) -> None:
    (accuracy,) = numbers(printed)
    assert accuracy > 0.5  # of five classes
    assert re.findall(r": +(\w+)$", printed, re.MULTILINE) == ["email"] * 3


def check_text_classification(printed: str) -> None:
    _, before, after = numbers(printed)
    assert before < 0.35
    assert after > 0.65
    assert "saved whole: ['model.classifier.weight', 'model.classifier.bias']" in printed
    assert "loaded again: ['email', 'asyncio']" in printed


def check_causal_lm(printed: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss (\S+), merged: ", printed)]
    assert len(losses) == 4  # each of them merged
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.4


def check_preference(printed: str) -> None:
    *_, before, after, reference = numbers(printed)
    assert after > 90 > before + 20
    assert reference == before


def check_dpo_after_sft(printed: str) -> None:
    before, after, none, margin, by_two = numbers(printed)
    assert after > 90 > before + 50
    assert (none, margin > 5, by_two) == (0, True, margin)
    assert "the same for each pair: True" in printed


def check_strength(printed: str) -> None:
    *rows, best = [numbers(line) for line in printed.splitlines()[1:]]
    assert [row[0] for row in rows] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    mirrored, upright, mean = zip(*(row[1:] for row in rows), strict=True)
    assert max(mirrored) > mirrored[0] + 0.3
    assert upright[0] > upright[4] + 0.2 > upright[6] + 0.2
    assert 0 < best[0] < 1
    assert max(mean) > max(mean[0], mean[4]) + 0.03


def check_lstm(printed: str) -> None:
    english, before, after = (float(score) for score in re.findall(r": +(0\.\d\d)", printed))
    assert english > before + 0.3
    assert after > before + 0.3
    assert "myformatter(helpformatter)" in printed.splitlines()[1]
    # Whether "None" has its capital too depends on the processor's sums.
    assert "(HelpFormatter): raise ArgumentError(None, msg)".lower() in printed.splitlines()[2].lower()
    assert "(HelpFormatter): raise ArgumentError(" in printed.splitlines()[2]


def check_quantized(printed: str) -> None:
    before, after, plain = numbers(printed)[:3]
    assert after < before - 0.4
    assert plain == pytest.approx(after, abs=0.05)
    assert "Linear4bit -> Linear" in printed


def check_deploy(printed: str) -> None:
    assert "Beautiful is better than ugly.\nExplicit is better than implicit." in printed
    assert re.findall(r"same outputs: (\w+)", printed) == ["False", "True", "True", "True"]


def check_engine(printed: str) -> None:
    losses = [float(loss) for loss in re.findall(r"engine (\d\.\d\d)", printed)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 1.5
    assert printed.count(": 21 tensors, ") == 5
    with_adapter = [float(loss) for loss in re.findall(r"with the adapter (\d\.\d\d)", printed)]
    assert with_adapter == pytest.approx([losses[2], losses[4]], abs=0.011)  # after the same steps, merged
    assert "the engine has the weights of save_merged in every bit: True" in printed


def check_own_variant(printed: str) -> None:
    before, after = numbers(printed)
    assert before < 0.6
    assert after > before + 0.2
    assert re.findall(r": (True|False)$", printed, re.MULTILINE) == ["True"] * 4


def check_sweep(printed: str) -> None:
    lines = [line for line in printed.splitlines() if "  with" not in line and " after" not in line]
    rates, ranks = [numbers(line) for line in lines[:5]], [numbers(line) for line in lines[5:]]
    assert [row[0] for row in rates] == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert [row[0] for row in ranks] == [1, 2, 4, 8, 16]
    last = [row[-1] for row in rates]
    assert max(last) > max(last[0], last[-1]) + 0.1  # the best rate is neither the least nor the largest
    assert ranks[2][-1] == max(last)  # it is the rank and rate of a run before
    assert ranks[0][-1] < ranks[2][-1] - 0.05
    assert all(row[1] + 0.05 < row[3] for row in ranks)


def check_fsdp2(printed: str) -> None:
    assert "a weight of (64, 192), of which each process holds (32, 192)" in printed
    before, after, plain = numbers(printed)[-3:]
    assert after < before - 0.4
    assert plain == pytest.approx(after, abs=0.011)


def check_deepspeed_zero(printed: str) -> None:
    before, after, size, plain = numbers(printed)
    assert after < before - 0.4
    assert plain == pytest.approx(after, abs=0.011)
    assert size < 600_000  # adapter and optimizer, without the base
    assert "the same weights in every bit: True" in printed


def check_ray_train(printed: str) -> None:
    whole, resumed = re.findall(r"^(?:whole|resumed): +(.*)$", printed, re.MULTILINE)
    assert whole == resumed  # to the last digit of the loss
    assert "the same adapter in every bit: True" in printed
    loss, accuracy, steps, size, alone = numbers(whole) + numbers(printed)[-2:]
    assert (loss < 0.9, accuracy > 0.65, steps) == (True, True, 60)
    assert size < 100_000
    assert alone == pytest.approx(accuracy, abs=0.011)


def check_fabric(printed: str) -> None:
    before, after, plain = (float(loss) for loss in re.findall(r"\b\d\.\d\d\b", printed))
    assert after < before - 0.4
    assert plain == pytest.approx(after, abs=0.011)
    assert "the same adapter to the last bit: True" in printed
    assert "28 tensors of the model are saved" in printed


CHECKS: dict[str, Callable[[str], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}

EXTRAS = {
    "quantized": ("examples,quantized", "bitsandbytes"),
    "ray_train": ("ray", "ray"),
    "deepspeed_zero": ("examples,deepspeed", "deepspeed"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)  # Ray starts its workers three times
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "finetune"])  # which test_finetune.py breaks off
def test_example_does_what_it_says_and_prints_what_is_shown(folder, name):
    if name in EXTRAS:
        extra, package = EXTRAS[name]
        pytest.importorskip(package, reason=f'{package} is not installed; pip install -e ".[{extra}]"')
    printed = run(folder, name, timeout=580)
    print(printed)
    CHECKS[name](printed)
    assert_alike(printed, SHOWN[name], rel=0.25, tolerance=0.15)  # with other processors and texts


@pytest.mark.slow
def test_example_of_deepspeed_prints_the_same_at_stage_3(folder):
    pytest.importorskip("deepspeed", reason='deepspeed is not installed; pip install -e ".[examples,deepspeed]"')
    check_deepspeed_zero(printed := run(folder, "deepspeed_zero", "--stage", "3"))
    assert_alike(printed, SHOWN["deepspeed_zero"], rel=0.25, tolerance=0.15)


def test_every_example_is_run_and_what_the_readme_shows_is_what_it_says():
    assert set(FILES) == set(COMMANDS) == {*CHECKS, "digits"}
    for name, check in CHECKS.items():
        check(SHOWN[name])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "title"), [("ray_train", "Ray Train"), ("deepspeed_zero", "DeepSpeed")])
def test_example_names_its_extra_where_the_package_is_missing(folder, name, title):
    extra, package = EXTRAS[name]
    missing = [package, "torchao"]  # torchao, where it is installed, writes notices of its own
    program = f"import runpy, sys; sys.path.insert(0, 'examples'); sys.modules.update(dict.fromkeys({missing}))"
    program += f"; runpy.run_path('examples/{name}.py')"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f'{name}.py: {title} is not installed; run pip install -e ".[{extra}]".\n'


def test_each_example_names_its_command_and_imports_what_users_import():
    """Each is one file that can be copied, with small_models.py at most."""
    for name, text in FILES.items():
        tree = ast.parse(text)
        assert f"python {COMMANDS[name]}\n" in (ast.get_docstring(tree) or "") + "\n"
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        assert "lightning_lora" in modules
        inside = {module for module in modules if module.startswith(("lightning_lora.", "unittest", "support"))}
        assert not inside | (modules & set(FILES)), name


def test_small_models_are_imported_by_examples_alone_and_import_nothing_of_the_package():
    text = (ROOT / "examples" / f"{BESIDE}.py").read_text()
    assert "lightning_lora" not in text
    made = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    used = {
        alias.name
        for tree in map(ast.parse, FILES.values())
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == BESIDE
        for alias in node.names
    }
    assert made == used


def test_model_that_is_broken_off_while_it_is_saved_leaves_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    small_models = importlib.import_module(BESIDE)
    monkeypatch.setattr(small_models, "HERE", tmp_path)
    whole, folder = Mock(), tmp_path / "manual_llama"
    whole.save_pretrained = lambda path: (path.mkdir(exist_ok=True), (path / "config.json").write_text("{}"))
    with pytest.raises(KeyboardInterrupt):
        small_models._save(folder, whole, Mock(save_pretrained=Mock(side_effect=KeyboardInterrupt)))
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        small_models._save(folder, whole)
    assert [path.name for path in tmp_path.rglob("*")] == ["manual_llama", "config.json"]

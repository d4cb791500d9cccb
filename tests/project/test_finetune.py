"""examples/finetune.py goes on where it was broken off, and its notebook is the same program.

WRITE_NOTEBOOK=1 in the environment writes examples/finetune.ipynb anew, with a badge for Colab where GITHUB_REPOSITORY
("owner/name") says where it lies.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_examples import check_finetune

from support.runs.examples import INSTALL, ROOT, SHOWN, checkout, notebook, repository_of, small_models_shared

PROGRAM, SMALL_MODELS, NOTEBOOK = (ROOT / "examples" / n for n in ("finetune.py", "small_models.py", "finetune.ipynb"))
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the example as its user does, with bars and loggers on. What it prints goes into two files."""
    command = [sys.executable, "examples/finetune.py"]
    with (folder / "printed").open("w") as printed, (folder / "said").open("w") as said:  # a full pipe halts it
        return subprocess.Popen(command, cwd=folder, env=QUIET, text=True, stdout=printed, stderr=said)


def break_off(folder: Path, checkpoint: Path, epoch: int, with_signal: int) -> int:
    """Start the example, and send a signal in the middle of the epoch after so many. Return the exit status."""
    run = start(folder)
    while epochs_in(checkpoint) < epoch:
        assert run.poll() is None, (folder / "said").read_text()
        time.sleep(0.05)
    run.send_signal(with_signal)
    status = run.wait(timeout=120)
    assert "test accuracy" not in (folder / "printed").read_text()
    return status


def epochs_in(checkpoint: Path) -> int:
    """The number of finished epochs; 0 where there is no file, or while it is being written."""
    try:
        return int(torch.load(checkpoint, weights_only=True)["epoch"]) + 1
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.timeout(600)  # the program starts twice
def test_a_run_that_is_killed_goes_on_and_deploys_what_was_best(folder: Path):
    pytest.importorskip("tensorboard", reason='tensorboard is not installed; pip install -e ".[examples]"')
    run = folder / "runs" / "finetune"
    last = run / "last.ckpt"
    with small_models_shared(folder, "examples"):
        assert break_off(folder, last, 1, signal.SIGKILL) == -signal.SIGKILL  # the machine dies
    reached = epochs_in(last)

    status = start(folder).wait(timeout=500)
    printed, said = ((folder / name).read_text() for name in ("printed", "said"))
    assert status == 0, said
    assert f"Restoring states from the checkpoint path at {last}" in said
    epochs = {int(epoch) for epoch in re.findall(r"\bEpoch (\d+)/19", printed)}  # in the progress bar
    assert min(epochs) >= reached > 0  # no finished epoch is trained again
    shown = printed[printed.index("test accuracy") :]
    labels = [[line.split(":")[0] for line in text.splitlines()] for text in (shown, SHOWN["finetune"])]
    assert labels[0] == labels[1]
    # How good it becomes depends on the base, whose words are drawn, and on where it was broken off: Lightning goes on
    # with other batches.
    assert float(re.findall(r"test accuracy: (\S+)", shown)[0]) > 0.3  # of five classes
    answers = re.findall(r": +(\w+)$", shown, re.MULTILINE)
    assert len(answers) == 3
    assert len(set(answers)) == 1  # whichever way it is deployed
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "best.ckpt", "last.ckpt", "logs", "merged"]
    assert all("lora_" in name or "classifier" in name for name in torch.load(last, weights_only=True)["state_dict"])


def test_the_notebook_is_the_program_cell_by_cell():
    text = NOTEBOOK.read_text() if NOTEBOOK.exists() else ""
    repository = repository_of(text)
    if os.environ.get("WRITE_NOTEBOOK"):
        repository = os.environ.get("GITHUB_REPOSITORY", "")
        NOTEBOOK.write_text(text := notebook(PROGRAM.read_text(), SMALL_MODELS.read_text(), repository))
    assert text == notebook(PROGRAM.read_text(), SMALL_MODELS.read_text(), repository)
    first, second, *codes = [
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"
    ]
    assert first == INSTALL
    assert second == f"%%writefile small_models.py\n{SMALL_MODELS.read_text().rstrip()}"
    *definitions, main = ast.parse(PROGRAM.read_text()).body[1:]
    same = ast.parse("\n".join(codes))
    assert ast.dump(same) == ast.dump(ast.Module([*definitions, *main.body], []))


def test_a_badge_opens_the_notebook_out_of_its_repository():
    written = notebook(PROGRAM.read_text(), SMALL_MODELS.read_text(), "someone/their-fork")
    assert "colab.research.google.com/github/someone/their-fork/blob/main/examples/finetune.ipynb" in written
    assert repository_of(written) == "someone/their-fork"
    assert repository_of(notebook(PROGRAM.read_text(), SMALL_MODELS.read_text())) == ""


EXECUTE = """
import nbformat, nbclient, sys
cells = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(cells)
assert cells.cells[1].source.startswith("%pip install")
del cells.cells[1]  # it is installed
nbclient.NotebookClient(cells, timeout=580, resources={"metadata": {"path": "."}}).execute()
for cell in cells.cells:
    for output in cell.get("outputs", []):
        sys.stdout.write(output.get("text", "") if output.get("name") == "stdout" else "")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_runs_from_top_to_bottom_and_prints_what_the_program_prints(tmp_path: Path):
    for package in ("nbclient", "ipykernel", "tensorboard"):
        pytest.importorskip(package, reason=f'{package} is not installed; pip install -e ".[test]"')
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK)]
    with small_models_shared(tmp_path):
        done = subprocess.run(command, cwd=tmp_path, env=QUIET, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    lines = "\n".join(line for line in done.stdout.splitlines() if line.partition(":")[0] in SHOWN["finetune"])
    print(lines)
    check_finetune(lines)
    assert (tmp_path / "small_models.py").read_text().rstrip() == SMALL_MODELS.read_text().rstrip()

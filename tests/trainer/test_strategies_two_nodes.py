"""Two launchers on this machine stand for two nodes: a killed process, a restart of all, the same end in every bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.ranks.processes import free_port, world
from support.ranks.sharded_adapters import assert_same_run
from support.runs.programs.two_nodes import fit


def launch(folder: Path, kind: str, port: int, node: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "support.runs.programs.two_nodes", str(folder), kind, str(port)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torch's store keeps addresses of the dead over a restart
    }
    with (folder / f"node{node}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["hsdp", *(["ddp"] if os.environ.get("LORA_FULL") else [])])  # a minute each
def test_two_nodes_with_a_killed_process_end_as_one_node_that_was_not_interrupted(tmp_path, kind):
    port = free_port()
    nodes = [launch(tmp_path, kind, port, node) for node in range(2)]
    codes: list[int | None] = []
    try:
        codes = [node.wait(timeout=480) for node in nodes]
    except subprocess.TimeoutExpired:
        codes = [node.poll() for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
    assert codes == [0, 0], [(tmp_path / f"node{node}.log").read_text()[-4000:] for node in range(2)]
    *found, on_a_node, everywhere = torch.load(tmp_path / "found.pt", weights_only=True)
    assert (on_a_node, everywhere) == ("2", "4")
    assert (tmp_path / "killed").exists()
    logs = [(tmp_path / f"node{node}.log").read_text() for node in range(2)]
    assert any("Restored all states from the checkpoint" in log for log in logs)
    assert_same_run(found, world(4).run(fit, tmp_path / "one node", kind, 1)[0])

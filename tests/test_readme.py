"""Every block of the README runs, in order, in one folder and one namespace, and prints what the README says.

A block whose first line is a comment with a file name is written to that file. The lightning-lora command is run where
the blocks before it left their files. Set-up commands are not run again here: .ci/run runs them, letter for letter. The
example's report is compared in test_examples.py.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from interchange import PEER_NOTICES

from lightning_lora.command.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


class Block(NamedTuple):
    language: str
    code: str
    line: int

    @property
    def file(self) -> str | None:
        name = re.match(r"# (\S+\.(py|yaml))\n", self.code)
        return name.group(1) if name else None


def find_blocks(text: str) -> list[Block]:
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(fence.group(1), fence.group(2), text[: fence.start()].count("\n") + 1) for fence in fences]


BLOCKS = find_blocks(README)


def is_set_up(command: str) -> bool:
    return command.startswith("pip install")


def is_ours(command: str) -> bool:
    return command.startswith("lightning-lora ")


PROGRAMS = {  # commands that print what follows them
    block.code: following.code
    for block, following in itertools.pairwise(BLOCKS)
    if block.language == "bash" and block.code.startswith("python ") and following.language == "text"
}


def run_python(block: Block, namespace: dict[str, object]) -> str:
    # The line numbers of an error are the README's.
    code = compile("\n" * block.line + block.code, "README.md", "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, namespace)
    return out.getvalue()


def run_ours(commands: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for command in commands.splitlines():
            program, *arguments = shlex.split(command, comments=True)
            assert program == "lightning-lora"
            assert main(arguments) == 0
    return out.getvalue()


def run_bash(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(script, run_name="__main__")


@pytest.mark.filterwarnings(*PEER_NOTICES)
def test_python_blocks_and_our_command_run_and_print_what_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block, following in itertools.pairwise([*BLOCKS, Block("", "", 0)]):
        if block.language == "python" and not block.file:
            printed = run_python(block, namespace)
        elif block.language == "bash" and is_ours(block.code):
            printed = run_ours(block.code)
        else:
            continue
        shown = following.code if following.language == "text" else ""
        assert shown == printed, f"README.md, line {block.line}"


def test_commands_run_on_the_files_that_are_shown(tmp_path, monkeypatch):
    """Each adapts the layer, and its checkpoint is of the kind that the file or the command line names."""
    monkeypatch.chdir(tmp_path)
    kinds = []
    for block in BLOCKS:
        if block.file:
            Path(block.file).write_text(block.code)
        elif block.language == "bash" and block.code.startswith("python ") and block.code not in PROGRAMS:
            before = set(tmp_path.rglob("*.ckpt"))
            run_bash(block.code, monkeypatch)
            (path,) = set(tmp_path.rglob("*.ckpt")) - before
            kinds.append(torch.load(path, weights_only=True)["lora"]["kind"])
    assert kinds == ["merged", "adapter"]


@pytest.mark.parametrize("command", PROGRAMS)
def test_programs_print_what_is_shown(tmp_path, command):
    """In processes of their own, as many as they start."""
    for block in BLOCKS:
        if block.file:
            (tmp_path / block.file).write_text(block.code)
    python, *arguments = shlex.split(command)
    assert python == "python"
    run = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout == PROGRAMS[command], run.stderr


def test_no_block_is_of_a_kind_that_nothing_runs():
    for previous, block in itertools.pairwise([Block("", "", 0), *BLOCKS]):
        known = block.language in ("python", "bash") or (block.language == "yaml" and block.file)
        output = block.language == "text" and previous.language in ("python", "bash")
        assert known or output, f"README.md, line {block.line}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash" and is_set_up(b.code)])
def test_set_up_commands_are_those_of_ci(block):
    for command in block.code.splitlines():
        assert f"run '{command}'\n" in CI


def test_the_first_screen_is_a_sentence_the_install_and_one_program_with_its_output():
    assert [block.language for block in BLOCKS[:3]] == ["bash", "python", "text"]
    assert BLOCKS[1].line < 12
    assert BLOCKS[2].line < 60


def test_files_that_the_readme_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target

"""Run programs in interpreters of their own, as forks of one that has imported torch: each import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

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

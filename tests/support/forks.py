"""Programs for an interpreter of their own that cost no import of torch each: forks of one that has imported it."""

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
    """Run programs one after the other, each with modules that are imported before it, for it and those after it.

    Returns by the program's name DONE, or else the traceback, or nothing where it ended at once.
    """
    command = [sys.executable, "-c", PARENT, json.dumps(programs)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    outcomes: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return outcomes

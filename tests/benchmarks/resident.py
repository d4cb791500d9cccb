"""Peak resident bytes of three training steps, alone in a process: resident.py CANDIDATE WIDTH DTYPE DROPOUT THREADS"""

from __future__ import annotations

import sys

import torch
from groups import inputs
from stack import CANDIDATES, stack, step


def main() -> None:
    name, d, dtype, dropout, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    kind = getattr(torch, dtype.removeprefix("torch."))
    model = CANDIDATES[name](stack(int(d), kind, "cpu"), float(dropout)).train()
    x = inputs(int(d), kind, "cpu")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the high-water mark
    except OSError:
        print(0)
        return
    before = status("VmRSS")
    for _ in range(3):
        step(model, x)
    print(status("VmHWM") - before)


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


if __name__ == "__main__":
    main()

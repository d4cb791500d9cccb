"""What the command prints: any text of a file with control characters shown, and nothing where nobody reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from ..errors import one_line, printable
from ..files.paths import reason_of

INTERRUPTED = 130  # exit codes as a shell reports them: 128 and the signal's number, of SIGINT and SIGPIPE
NOBODY_READS = 141


def print_lines(verb: str, lines: Sequence[str]) -> int:
    """Print what a verb says, a line each; returns the exit code."""
    text = "\n".join(map(printable, lines))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        discard_output()
        return NOBODY_READS
    except OSError as error:
        discard_output()
        return print_failure(verb, f"what it says cannot be printed: {reason_of(error)}.")
    return 0


def print_failure(verb: str, reason: str, status: int = 1) -> int:
    """Print in one line why a verb failed; returns the exit code."""
    reason = one_line(reason.removeprefix(f"{verb}: "))
    with suppress(OSError):
        print(f"lightning-lora {verb}: {reason}", file=sys.stderr, flush=True)
    return status


def discard_output() -> None:
    """Send the rest of the output nowhere. Python would complain of a closed pipe at exit."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

"""Graphs, compilers, waits, memory, random streams and recurrent layers on a GPU."""

from pretend.test_what_a_gpu_meets import *  # noqa: F403

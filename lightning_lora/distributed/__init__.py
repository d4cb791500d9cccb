"""Sharded tensors: which part of a tensor is on this rank, and steps that all ranks take together."""

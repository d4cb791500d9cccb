"""Devices that are not the CPU: a pretended one, or a GPU."""

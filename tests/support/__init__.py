"""Helpers that tests of several rooms share. There are no tests here; what one test file uses alone is in that file.

models   models of our own and of other packages, and references in float64
runs     Trainers, programs, what is recorded
ranks    several processes, each strategy
files    what a file must hold
devices  a pretended device, or a GPU
"""

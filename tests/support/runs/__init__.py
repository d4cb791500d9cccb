"""Trainers and what a run must leave, programs that tests start, and what is recorded while something runs."""

"""Looking, which changes nothing: the summary, statistics, and pictures of adapters and of a run's log.

A picture is measured, concluded from and drawn in files of their own.
"""

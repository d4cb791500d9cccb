"""Looking at a model without changing it: the summary, statistics, and pictures of adapters and of a run's log.

Measuring, concluding and drawing are in separate files.
"""

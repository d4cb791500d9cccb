"""Looking at a model without changing it: the summary, statistics, and two pictures of an adapter.

Measuring and drawing are in separate files.
"""

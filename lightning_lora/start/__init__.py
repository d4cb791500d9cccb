"""Adapters that start from training data: batches are run through an injected model before its training."""

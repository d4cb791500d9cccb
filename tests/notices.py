"""What Lightning says that is no fault of a test."""

# Lightning's advice about the machine or the run, which says nothing about this package: how it begins, and its kind.
LIGHTNING_NOTICES: dict[str, type[Warning]] = {
    "The '.*_dataloader' does not have many workers": UserWarning,
    r"The number of training batches \(\d+\) is smaller than the logging interval": UserWarning,
    "Checkpoint directory .* exists and is not empty": UserWarning,
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": FutureWarning,
    "Starting from v1.9.0, `tensorboardX` has been removed": UserWarning,
    "Trying to infer the `batch_size` from an ambiguous collection": UserWarning,
}

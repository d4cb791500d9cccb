"""What Lightning says that is no fault of a test."""

# Lightning's advice about the machine or the run, which says nothing about this package.
LIGHTNING_NOTICES = (
    "The '.*_dataloader' does not have many workers",
    "The number of training batches",
    "Checkpoint directory .* exists and is not empty",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "Starting from v1.9.0, `tensorboardX` has been removed",
    "Trying to infer the `batch_size`",
)

"""What a Trainer needs beyond the callback's plain hooks: checkpoints, strategies, layers that are built late."""

"""What a Trainer needs beside the plain hooks of the callback: checkpoints, strategies, layers that are built late."""

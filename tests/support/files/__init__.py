"""What a file must hold, read and computed by nothing of the package."""

"""A whole model: put adapters in, take them out, merge, and view its state. No files, no Trainer."""

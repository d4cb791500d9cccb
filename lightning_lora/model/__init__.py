"""A whole model: put adapters in, take them out, merge them, and view the state. No files, no Trainer."""

"""The `lightning-lora` command: adapters and merged weights on disk, without building a model."""

"""Bytes on disk: safetensors, torch.save's archives, model folders. Nothing here knows LoRA."""

"""Bytes on disk: safetensors, torch.save's archives, model folders. Nothing here knows what an adapter is."""

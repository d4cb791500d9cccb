"""An adapter apart from any model: its tensors, options, layer names and the fingerprint of its base.

Nothing here knows a model, or a file format of others.
"""

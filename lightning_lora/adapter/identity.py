"""What tells one adapter from another, whatever its layers are called."""

from __future__ import annotations

import hashlib

from .adapter import Adapter


def digest_of(adapter: Adapter) -> str:
    """Return a digest of the products that an adapter adds. It stays where B is scaled, or a rank of zeros is added."""
    of_layers = []
    for layer in adapter.layers:
        a, b, _ = adapter.effective_factors(layer)
        b = b.double() * adapter.scaling(layer)
        if len(a) == b.shape[1]:
            acting = a.flatten(1).any(1) & b.transpose(0, 1).flatten(1).any(1)
            a, b = a[acting], b[:, acting]
        digest = hashlib.sha256(repr((tuple(a.shape), tuple(b.shape))).encode())
        for factor in (a, b):
            digest.update(factor.float().contiguous().cpu().numpy().tobytes())
        of_layers.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(of_layers)).encode()).hexdigest()

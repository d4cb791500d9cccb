"""Each kind of layer, variant and precision on a GPU: steps, and merging."""

from pretend.test_kinds_of_layers import *  # noqa: F403

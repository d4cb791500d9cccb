"""The table of pairs on a GPU."""

from pretend.test_pairs_on_a_device import *  # noqa: F403

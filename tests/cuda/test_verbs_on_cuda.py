"""Every verb on a GPU, and moves from one device to the other."""

from pretend.test_verbs_on_a_device import *  # noqa: F403

"""A Trainer on a GPU."""

from pretend.test_trainers_on_a_device import *  # noqa: F403

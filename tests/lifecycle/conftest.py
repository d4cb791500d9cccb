"""Assertions in the helpers of these tests show their values."""

import pytest

pytest.register_assert_rewrite("comparing", "helpers")

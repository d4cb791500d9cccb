"""A change of several things, which is done whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def transaction() -> Iterator[ExitStack]:
    """Take changes back where the block raises, the last one first; where it does not, forget them.

    Each change is preceded by `on_error.callback(function, *arguments)` with what takes it back. Preceded, because an
    exception, such as KeyboardInterrupt, may come in the middle of the change: so the function must do no harm where
    the change has not begun. All of them are called, even where one raises.

        with transaction() as on_error:
            on_error.callback(setattr, injection, "config", injection.config)
            injection.config = config

    It is a generator and no class with __exit__: an exception that comes between the end of the block and __exit__
    closes the generator, and so takes the changes back too.
    """
    with ExitStack() as on_error:
        yield on_error
        on_error.pop_all()

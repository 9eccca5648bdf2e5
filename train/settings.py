"""Checks of numbers in settings: what is refused names its key, what was found, and what is expected."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def at_least(minimum: float, settings: Any, section: str, *names: str) -> None:
    """ValueError for an attribute that is less, infinite or no number; None: a setting that is not given."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"{section}{name} is {value}, expected at least {minimum}")


def above_zero(settings: Any, section: str, *names: str) -> None:
    """As at_least, for what must be more than 0."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{section}{name} is {value}, expected a number above 0")


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Puts a setting's key before what is wrong with what it refers to."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error

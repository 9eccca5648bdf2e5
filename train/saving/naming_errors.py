"""OSErrors that say what was being done: that of a full disk has its number and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


@contextmanager
def naming_errors(doing: str) -> Iterator[None]:
    """OSError "could not `doing`: reason", with the same errno; so also for what safetensors cannot write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = OSError(f"could not {doing}: {getattr(error, 'strerror', None) or error}")
        named.errno = getattr(error, "errno", None)
        raise named from error

"""Tells a machine's fault from the user's, by what torch raises."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from conf.command import HardwareFault
from train.processes.world import World

# of file systems and networks that were there a moment ago, and after the retries of who reads them
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EREMOTEIO, errno.ENODEV}
# gloo raises plain RuntimeErrors
LOST_PEER = (
    "gloo/transport/",
    "gloo/rendezvous/",
    "Gloo connectFullMesh failed",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
)


@contextmanager
def hardware_faults() -> Iterator[None]:
    """Errors of GPUs, networks, file systems and lost peers leave as HardwareFault, with rank and host.

    Too little GPU memory is the user's ValueError: it would be too little again.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{_who()} is out of GPU memory: lower data.max_tokens, choose another cluster= "
            f"or model.activation_checkpointing=full ({_first_line(error)})"
        ) from error
    except (distributed.DistError, torch.AcceleratorError) as error:
        raise HardwareFault(f"{_who()}{_where(error)}: {_first_line(error)}") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        raise HardwareFault(f"{_who()} lost another rank{_where(error)}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno not in TRANSIENT:
            raise
        raise HardwareFault(f"{_who()}: {error}") from error


def _who() -> str:
    """By the process group where there is one: Lightning's own launcher says nothing in the environment."""
    if not distributed.is_initialized():
        return str(World.of_this_process())
    host = World.of_this_process().host
    return f"rank {distributed.get_rank()} of {distributed.get_world_size()} on {host}"


def _where(error: Exception) -> str:
    """The collective that failed; DDP's are called by the backward, which no Python frame shows."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [f.name for f in frames if f.filename.endswith(("distributed_c10d.py", "autograd/graph.py"))]
    return f" in {names[-1].replace('_engine_run_backward', 'the backward')}" if names else ""


def _first_line(error: Exception) -> str:
    """Its first sentence, in ASCII: gloo adds advice for programmers, and an emoji."""
    words = " ".join(str(error).encode("ascii", "ignore").decode().split("\n")[0].split())
    return words.split(". ")[0]

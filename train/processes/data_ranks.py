"""Who reads data of its own: every rank, or one for each group that shares the tokens of its clips."""

from typing import NamedTuple

import lightning as L
import torch.distributed as dist
from torch.distributed import ProcessGroup


class DataRanks(NamedTuple):
    """The place of this rank among those that read different packs."""

    rank: int
    size: int

    @classmethod
    def of(cls, trainer: L.Trainer, sequence_parallel: int) -> "DataRanks":
        """ValueError where a group would reach over a node's border."""
        if trainer.num_devices % sequence_parallel:
            possible = [d for d in range(1, trainer.num_devices + 1) if trainer.num_devices % d == 0]
            raise ValueError(
                f"model.sequence_parallel={sequence_parallel} does not divide the {trainer.num_devices} "
                f"ranks of a node; possible: {', '.join(map(str, possible))}"
            )
        return cls(trainer.global_rank // sequence_parallel, trainer.world_size // sequence_parallel)


def sequence_group(sequence_parallel: int) -> ProcessGroup:
    """This rank's group of so many consecutive ranks; a collective of all ranks.

    It has the run's timeout, which strategies.set_group_timeout has made torch's own.
    """
    group, _ = dist.new_subgroups(sequence_parallel)
    return group

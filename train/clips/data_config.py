"""What a run trains on, and how its clips become batches."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from storyanchors.shard_store import check_setting
from train.clips.clip_stream import Mix
from train.settings import at_least


@dataclass
class DatasetShare:
    """A dataset of a mix."""

    dataset: str = MISSING
    weight: float | None = None  # in proportion to its share of the clips; None = every clip equally often

    def __post_init__(self):
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of {self.dataset} in data.mix is {self.weight}, expected above 0")


@dataclass
class DataConfig:
    dataset: str | None = None  # this or data.mix
    mix: list[DatasetShare] = field(default_factory=list)  # several: [{dataset: A, weight: 2}, ...]
    clips_per_batch: int = 16  # of an optimizer step over all ranks, on average
    packs_per_batch: int | None = None  # micro-batches of a step; None = the ranks of the run's first start
    max_tokens: int | None = None  # video tokens of a pack at most; None = no limit
    look_ahead: int = 4  # batches that are balanced together
    drop_too_long: bool = False  # leave out clips above max_tokens instead of stopping
    holdout: float = 0.02  # share of the source videos that is never trained on
    num_workers: int = 2  # processes that read and decode; 0 = the training process does
    prefetch_mb: int = 4096  # of clips that wait in memory, per rank, at most
    max_broken_share: float = 0.001  # of the clips seen; above it the run stops
    log_keys: bool = False  # write the clips of every step to <run>/keys/, for those who want to check

    def __post_init__(self):
        self.mix = [share if isinstance(share, DatasetShare) else DatasetShare(**share) for share in self.mix]
        at_least(1, self, "data.", "clips_per_batch", "packs_per_batch", "max_tokens", "look_ahead")
        at_least(0, self, "data.", "num_workers", "prefetch_mb")
        for name in ("holdout", "max_broken_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, expected at least 0 and below 1")
        if self.drop_too_long and self.max_tokens is None:
            raise ValueError("data.drop_too_long=true needs data.max_tokens, which says what is too long")
        if len({share.dataset for share in self.mix}) < len(self.mix):
            raise ValueError("data.mix names a dataset twice: give it one weight")
        if 0 < len([share for share in self.mix if share.weight is None]) < len(self.mix):
            raise ValueError("some datasets of data.mix have a weight and some have none: give all or none")

    @property
    def datasets(self) -> list[str]:
        """ValueError unless exactly one of data.dataset and data.mix is given."""
        if (self.dataset is None) == (not self.mix):
            found = "neither is given" if self.dataset is None else "both are given"
            raise ValueError(f"expected data.dataset=FOLDER or data.mix=[{{dataset: FOLDER}}, ...]: {found}")
        return list(map(check_setting, [self.dataset] if self.dataset else [s.dataset for s in self.mix]))

    def mix_of(self, num_clips: tuple[int, ...]) -> Mix | None:
        """The mix of datasets with so many clips; None where every clip comes equally often."""
        if not self.mix or self.mix[0].weight is None:
            return None
        return Mix(num_clips, tuple(share.weight for share in self.mix))

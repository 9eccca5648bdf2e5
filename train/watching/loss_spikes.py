"""Names the clips whose loss leaps, so that a person can look at them."""

import math
from collections.abc import Iterator

SPIKE_DEVIATIONS, SPIKE_FACTOR = 5, 3  # above the running mean of a loss's logarithm, in both measures
SPIKE_MEMORY = 0.998  # of the running mean, for each clip: some hundreds of them count


class LossSpikes:
    """Clips whose loss is far above this rank's own running mean: broken data, or a run about to diverge.

    Noise levels scatter losses over a factor of ten or more, about evenly in their logarithms.
    """

    def __init__(self):
        self.count, self.mean, self.square = 0, 0.0, 0.0

    def found(self, keys: list[str], losses: list[float]) -> Iterator[str]:
        for key, loss in zip(keys, losses, strict=True):
            value = math.log(max(loss, 1e-12))  # of a NaN it is one
            deviation = math.sqrt(max(0.0, self.square - self.mean**2))
            limit = self.mean + max(SPIKE_DEVIATIONS * deviation, math.log(SPIKE_FACTOR))
            if not math.isfinite(value) or (self.count >= 100 and value > limit):
                yield f"clip {key} has {loss:.4g}, the running mean is {math.exp(self.mean):.4g}"
            else:  # a spike does not move what spikes are told by
                self.count += 1
                share = max(1 - SPIKE_MEMORY, 1 / self.count)
                self.mean += share * (value - self.mean)
                self.square += share * (value**2 - self.square)

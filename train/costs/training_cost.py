"""What a stage costs: FLOPs, seconds of a step, bytes on disk, from one assumption: the MFU of a busy GPU.

The balance of packs comes from the run's own data plan; traffic and jitter from formulas whose constants
stand here. Nothing of it was measured on GPUs.

Legend: P all weights, T those that are trained, W ranks.
"""

import math
from dataclasses import dataclass

import numpy as np

from train.costs.memory_model import FLOAT32, Layout, Network
from train.data_plan import DataPlan

# Bus bandwidth of collectives: 8 x 400 Gbit/s a node of which 85 % can be used; inside a node NVLink.
NETWORK_BYTES_PER_S, NVLINK_BYTES_PER_S = 340e9, 360e9
EXPOSED = 0.1  # of the traffic: what computing does not hide
JITTER = 0.005  # standard deviation of a rank's time for a step, in steps
SEQUENCE_PARALLEL_TAX = 0.05  # all-to-all inside a node
JPEG_BYTES_PER_PIXEL = 0.78  # quality 95, 4:4:4: 406 kB at 960 x 544, of one film
WAN_ENCODE_FLOPS_PER_PIXEL = 2.33e6  # of the codec that single frames need
UMT5_FLOPS_PER_CAPTION = 5.8e12  # umt5-xxl, 512 tokens
SAVE_BYTES_PER_S = 1e9  # that all nodes together write to a shared file system
STOP_MARGIN_S = 60  # until all ranks have noticed the signal, agreed, and left


@dataclass(frozen=True)
class PlannedWork:
    """The mean of the data plan's first global batches."""

    clips: float
    tokens: float
    flops: float  # of a forward over the batch
    longest_path: float  # FLOPs of the dearest pack of every micro-step, one after the other
    largest_pack: int  # tokens
    micro_steps: int

    @classmethod
    def of(cls, plan: DataPlan, num_ranks: int, *, num_batches: int = 8) -> "PlannedWork":
        batches, position = [], 0
        for _ in range(num_batches):
            batches.append(plan.batch(position))
            position = batches[-1].end
        rows = [[[clip.row for clip in pack] for pack in batch.packs] for batch in batches]
        tokens = np.array([[plan.tokens[pack].sum() for pack in packs] for packs in rows])
        flops = np.array([[plan.costs[pack].sum() for pack in packs] for packs in rows])
        micro_steps = flops.shape[1] // num_ranks
        return cls(
            clips=position / num_batches,
            tokens=float(tokens.sum(1).mean()),
            flops=float(flops.sum(1).mean()),
            longest_path=float(flops.reshape(num_batches, micro_steps, num_ranks).max(2).sum(1).mean()),
            largest_pack=int(tokens.max()),
            micro_steps=micro_steps,
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go to."""

    network: float  # of the rank that the others wait for
    frozen_parts: float  # codec and text encoder
    traffic: float  # that nothing hides
    jitter: float
    balance: float  # share of the ranks' time in which they compute

    @property
    def total(self) -> float:
        return self.network + self.frozen_parts + self.traffic + self.jitter


def step_time(
    work: PlannedWork,
    network: Network,
    layout: Layout,
    *,
    train_factor: float,
    frozen_flops: float,
    flops_per_s: float,
    gpus_per_node: int,
) -> StepTime:
    """train_factor: FLOPs of a training step over those of a forward; frozen_flops: per batch.

    flops_per_s is what a busy GPU does: its peak times the assumed MFU.
    """
    shared = layout.sequence_parallel * (1 - SEQUENCE_PARALLEL_TAX if layout.sequence_parallel > 1 else 1)
    data_ranks = layout.world_size // layout.sequence_parallel
    computing = train_factor * work.longest_path / flops_per_s / shared
    frozen = frozen_flops / data_ranks / flops_per_s
    bandwidth = NVLINK_BYTES_PER_S if layout.world_size <= gpus_per_node else NETWORK_BYTES_PER_S
    traffic = EXPOSED * traffic_bytes(network, layout, work.micro_steps) / bandwidth
    # the slowest of W normal times (extreme value theory)
    jitter = (computing + frozen) * JITTER * math.sqrt(2 * math.log(layout.world_size))
    balance = work.flops / (data_ranks * work.longest_path)
    return StepTime(computing, frozen, traffic, jitter, balance)


def traffic_bytes(network: Network, layout: Layout, micro_steps: int) -> float:
    """That a rank sends in a step, in float32: reduce-scatter and all-gather move (W - 1) / W of the tensor.

    DDP and ZeRO-1 reduce once a step, ZeRO-2 after every micro-step, ZeRO-3 gathers all weights twice and
    reduces in every micro-step (Rajbhandari et al. 2020, section 7).
    """
    share = (layout.world_size - 1) / layout.world_size
    gradients, weights = FLOAT32 * network.num_trained, network.weight_bytes
    if layout.stage == 3:
        return share * micro_steps * (2 * weights + gradients)
    return share * (gradients * (micro_steps if layout.stage == 2 else 1) + FLOAT32 * network.num_trained)


def checkpoint_bytes(network: Network) -> int:
    """Float32 weights, average and two moments of all that is trained, whatever the strategy."""
    return 4 * FLOAT32 * network.num_trained

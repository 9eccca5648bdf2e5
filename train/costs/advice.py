"""What makes a run fit that does not: candidate changes of its words, each tried by estimating the run anew.

A change says how the network is spread. The packs follow from it: at most as many tokens as then fit, and
as many packs as keep the clips of a step, one after the other on each rank (gradient accumulation).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from itertools import product
from typing import Any

from train.costs.estimated_run import Estimate, EstimateConfig

SHOWN = 4
MOST_NODES = 64
GPUS_OF_A_NODE = 8
MOST_MORE_CLIPS = 1.25  # a step's clips may grow by this to be shared by all ranks
LEAST_CLIPS = 0.99  # of data.clips_per_batch that a step must keep on average
Change = dict[str, Any]


@dataclass(frozen=True)
class Remedy:
    """Words to add to those of the run, and the run with them."""

    words: str
    estimate: Estimate


def remedies(estimate: Estimate) -> list[Remedy]:
    """The first that fit: fewer changes first, a LoRA last, and none that asks for more than one before it.

    An estimate that does not fit is expected.
    """
    found: dict[tuple[int, ...], Remedy] = {}
    for degrees, change in _changes(estimate.config):
        is_more = any(all(a <= b for a, b in zip(other, degrees, strict=True)) for other in found)
        if len(found) < SHOWN and not is_more and (remedy := _tried(estimate, change)):
            found[degrees] = remedy
    if (0, 0, 0, 0) not in found and estimate.config.world_size > 1:
        nodes = ({"nodes": number} for number in (2 * estimate.config.nodes, 4 * estimate.config.nodes))
        more_nodes = next(filter(None, (_tried(estimate, change) for change in nodes)), None)
        return [*found.values(), *([more_nodes] if more_nodes else [])]
    return list(found.values())


def smallest_machine(estimate: Estimate) -> Remedy | None:
    """The fewest GPUs more, and nodes, on which it would fit with the whole network in training."""
    for machine in _larger_machines(estimate.config):
        for _, change in _changes(_changed(estimate.config, machine)):
            if "model.lora.rank" not in change and (remedy := _tried(estimate, machine | change)):
                return remedy
    return None


def most_tokens(config: EstimateConfig) -> int:
    """Of a pack that fits, in steps of 100; 0 where not even the rest does."""
    limit, low, high = config.layout.gpu_bytes, 0, 100_000
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if config.memory(100 * middle).total <= limit else (low, middle - 1)
    return 100 * low


def _changes(config: EstimateConfig) -> list[tuple[tuple[int, ...], Change]]:
    """All combinations on the same GPUs, also no change at all; how far each goes in every kind of change."""
    kinds = [[{}, *choices] for choices in (_checkpointing(config), _shards(config), _degrees(config))]
    kinds.append([{}, *_loras(config)])
    combined = {
        degrees: {
            key: value for kind, n in zip(kinds, degrees, strict=True) for key, value in kind[n].items()
        }
        for degrees in product(*(range(len(kind)) for kind in kinds))
    }
    effort = lambda degrees: (degrees[-1], sum(map(bool, degrees)), degrees[::-1])  # noqa: E731
    return sorted(combined.items(), key=lambda item: effort(item[0]))


def _checkpointing(config: EstimateConfig) -> list[Change]:
    is_full = config.model.activation_checkpointing == "full"
    return [] if is_full else [{"model.activation_checkpointing": "full"}]


def _shards(config: EstimateConfig) -> list[Change]:
    """More of the states shared out, then in the host's memory."""
    now, changes = config.layout.stage, []
    trainer = {"trainer.devices": "auto"} if config.trainer.get("devices") == 1 else {}
    if not config.layout.is_bf16:
        trainer["trainer.precision"] = "bf16-mixed"  # as in conf/cluster
    if config.world_size > 1:
        changes += [{"strategy": f"zero{stage}"} for stage in (2, 3) if stage > now]
    if not config.offload:
        changes += [{"strategy": f"zero{stage}", "offload": True} for stage in (2, 3) if stage >= now]
    return [change | trainer for change in changes]


def _degrees(config: EstimateConfig) -> list[Change]:
    heads, now = config.model.dit_config.num_attention_heads, config.model.sequence_parallel
    possible = [n for n in (2, 4, 8) if n > now and heads % n == 0 and config.gpus_per_node % n == 0]
    return [{"model.sequence_parallel": degree} for degree in possible]


def _loras(config: EstimateConfig) -> list[Change]:
    is_possible = config.model.lora.rank is None and config.model.base_weights is not None
    return [{"model.lora.rank": 16}] if is_possible else []


def _larger_machines(config: EstimateConfig) -> Iterator[Change]:
    if config.nodes == 1:
        for gpus in range(2 * config.gpus_per_node, GPUS_OF_A_NODE + 1, config.gpus_per_node):
            yield {"gpus_per_node": gpus}
    more = {"gpus_per_node": GPUS_OF_A_NODE} if config.gpus_per_node < GPUS_OF_A_NODE else {}
    for nodes in range(config.nodes + 1, MOST_NODES + 1):
        yield more | {"nodes": nodes}


def _tried(estimate: Estimate, change: Change) -> Remedy | None:
    """The change with the packs that it needs; None where it does not fit, or run_stage refuses it."""
    try:
        config = _changed(estimate.config, change)
        if (most := most_tokens(config)) < estimate.longest_clip:
            return None
        most = min(most, config.data.max_tokens or most)
        for packs in _packs(config, most, estimate.work.tokens / estimate.work.clips):
            tried = Estimate.of(_changed(config, packs), estimate.clips)
            if tried.fits and tried.work.clips >= LEAST_CLIPS * config.data.clips_per_batch:
                words = " ".join(f"{key}={value}".lower() for key, value in (change | packs).items())
                return Remedy(words, tried)
    except ValueError:
        return None
    return None


def _packs(config: EstimateConfig, most: int, clip_tokens: float) -> list[Change]:
    """Packs that the ranks can share and under which a step's tokens could fit; the same clips first.

    most: tokens of a pack; clip_tokens: of a mean clip.
    """
    data, ranks, same, more = config.data, config.data_ranks, [], []
    for num_packs in range(ranks, int(MOST_MORE_CLIPS * data.clips_per_batch) + 1, ranks):
        num_clips = data.clips_per_batch
        if data.look_ahead * num_clips % num_packs or num_clips < num_packs:
            num_clips = num_packs * math.ceil(num_clips / num_packs)
        fit = num_packs * most >= LEAST_CLIPS * num_clips * clip_tokens
        if fit and num_packs >= (data.packs_per_batch or 1):
            change = {"data.packs_per_batch": num_packs, "data.max_tokens": most}
            if num_clips == data.clips_per_batch:
                same.append(change)
            elif num_clips <= MOST_MORE_CLIPS * data.clips_per_batch:
                more.append(change | {"data.clips_per_batch": num_clips})
    return same + more


def _changed(settings: Any, change: Change) -> Any:
    """As the words would: settings with the value of each dotted key."""
    for key, value in change.items():
        name, _, rest = key.partition(".")
        inner = getattr(settings, name) if is_dataclass(settings) else settings.get(name)
        new = {name: _changed(inner, {rest: value}) if rest else value}
        settings = replace(settings, **new) if is_dataclass(settings) else settings | new
    return settings

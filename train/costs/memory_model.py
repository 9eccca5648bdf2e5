"""Memory of one GPU while it trains, part by part, from the network's parameters and a pack's tokens.

Weights, gradients, masters, moments and average are counted exactly (tests compare them with what torch and
DeepSpeed allocate); activations by storyanchors/activation_checkpointing.py, which counts what eager mode
keeps (a test compares the peak with torch's own tracker: never below it, at most a quarter above).
Sizes of ZeRO's parts: Rajbhandari et al. 2020, "ZeRO", section 5; here every number has 4 bytes, since
weights and sums stay float32 under every strategy (train/processes/strategies.py).

Legend: P all weights, T those that are trained, W ranks, D width.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from storyanchors.activation_checkpointing import activation_bytes, fitting_modes
from storyanchors.dit import StoryDiT
from storyanchors.dit_config import StoryDiTConfig
from storyanchors.lora import LoraSettings, add_lora, cast_base
from storyanchors.wan_vae import FrameVae, FrameVaeConfig
from train.parts import FITTED_CODEC, ModelConfig

FLOAT32, BF16 = 4, 2
GIB = 2**30
# What nobody asked for: CUDA's and NCCL's own memory, and holes between blocks. Assumed, not measured here.
RESERVED_BYTES = 4 * GIB
UMT5_XXL_WEIGHTS = 5_680_910_336  # google/umt5-xxl's encoder; Wan runs it in bfloat16
# WanCodec cuts frames into batches of 2**22 pixels; its widest maps have 96 channels in float32, 4 at a time
WAN_CODEC_AT_WORK = 2**22 * 96 * FLOAT32 * 4
STAGE_3_LIVE = 1_000_000_000  # weights that DeepSpeed leaves gathered (stage3_max_live_parameters)
BUCKET = 200_000_000  # numbers that are reduced at once (train/processes/strategies.py)


@dataclass(frozen=True)
class Network:
    """A network's numbers, counted on a module without memory."""

    weight_bytes: int  # of P
    num_weights: int
    num_trained: int
    largest_weight: int
    block_weights: int  # of one block

    @classmethod
    def of(cls, config: ModelConfig) -> "Network":
        return cls._counted(config.dit_config, config.lora.rank)

    @classmethod
    @lru_cache(maxsize=8)
    def _counted(cls, dit_config: StoryDiTConfig, lora_rank: int | None) -> "Network":
        with torch.device("meta"):
            dit = StoryDiT(dit_config)
            if lora_rank is not None:
                add_lora(dit, LoraSettings(lora_rank))
                cast_base(dit, torch.bfloat16)
        parameters = list(dit.parameters())
        return cls(
            weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
            num_weights=sum(p.numel() for p in parameters),
            num_trained=sum(p.numel() for p in parameters if p.requires_grad),
            largest_weight=max(p.numel() for p in parameters),
            block_weights=sum(p.numel() for p in dit.blocks[0].parameters()),
        )


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what memory depends on beside the network and the pack."""

    strategy: str  # auto | ddp | zero1 | zero2 | zero3
    world_size: int
    offload: bool
    sequence_parallel: int
    is_bf16: bool
    checkpointing: str  # none | selective | full | auto
    accumulates: bool  # several micro-steps to a step
    gpu_bytes: int | None  # None: a CPU

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without it."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    @property
    def compute_size(self) -> int:
        return BF16 if self.is_bf16 else FLOAT32


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part, at the worse of two moments: when the backward pass begins and ends."""

    parts: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)  # in the host's memory instead, of one rank
    block_modes: list[str] = field(default_factory=list)  # what each block keeps

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def state_bytes(network: Network, layout: Layout) -> dict[str, int]:
    """What lives from step to step: exact but for ZeRO's padding to whole shares."""
    T, W = network.num_trained, layout.world_size
    share = -(-T // W) if layout.stage else T
    return {
        "weights": -(-network.weight_bytes // W) if layout.stage == 3 else network.weight_bytes,
        "gradients": FLOAT32 * (share if layout.stage >= 2 else T),
        "masters": FLOAT32 * share if layout.stage else 0,
        "moments": 2 * FLOAT32 * share,
        "average (EMA)": FLOAT32 * share,
    }


def kept_bytes(config, num_tokens: int, modes: list[str], compute_size: int) -> int:
    """What the forward pass of a pack keeps: blocks, and the two ends of the network."""
    blocks = sum(activation_bytes(config, mode, FLOAT32, compute_size) for mode in modes)
    ends = (FLOAT32 + 2 * compute_size) * config.hidden_dim
    return int(num_tokens * (blocks + ends))


def working_bytes(network: Network, config, num_tokens: int, is_checkpointed: bool, compute_size: int) -> int:
    """What the backward pass of one block makes: what checkpointing left out, and gradients on their way."""
    again = activation_bytes(config, "none", FLOAT32, compute_size) if is_checkpointed else 0
    gradients = 2 * compute_size * config.ffn_dim + 2 * FLOAT32 * config.hidden_dim
    return int(num_tokens * (again + gradients) + network.largest_weight * (FLOAT32 + compute_size))


def training_memory(
    network: Network, config: ModelConfig, layout: Layout, pack_tokens: int, *, text_encoder: bool
) -> Memory:
    """Of one rank with its largest pack; text_encoder: whether captions are encoded on the GPU."""
    dit_config, num_tokens = config.dit_config, -(-pack_tokens // layout.sequence_parallel)
    state = state_bytes(network, layout)
    host: dict[str, int] = {}
    if layout.offload:
        host = {name: state.pop(name) for name in ("masters", "moments", "average (EMA)")}
        if layout.stage == 3:
            host["weights"] = state.pop("weights")
    frozen = codec_bytes(config) + (BF16 * UMT5_XXL_WEIGHTS if text_encoder else 0)
    state |= {"codec and text encoder": frozen, "buffers and gathered weights": buffer_bytes(network, layout)}
    modes = _block_modes(dit_config, num_tokens, layout, sum(state.values()))
    copies = _weight_copies(network, layout, modes)
    work = working_bytes(network, dit_config, num_tokens, "none" not in modes, layout.compute_size)
    kept = [kept_bytes(dit_config, num_tokens, blocks, layout.compute_size) for blocks in (modes, modes[:1])]
    gradients = state.pop("gradients")
    stay = layout.strategy != "auto" or layout.accumulates  # else torch frees them after every step
    before = (gradients if stay else 0, max(codec_work(config), kept[0] + work + copies))
    after = (gradients, kept[1] + work)
    gradients, activations = max(before, after, key=sum)
    parts = {**state, "gradients": gradients, "activations": activations, "reserved": RESERVED_BYTES}
    return Memory({name: size for name, size in parts.items() if size}, host, modes)


def codec_bytes(config: ModelConfig) -> int:
    """Weights of the frozen codec in float32; WanCodec's are those that single frames need."""
    return 0 if config.codec == FITTED_CODEC else FLOAT32 * _wan_codec_weights()


@lru_cache(maxsize=1)
def _wan_codec_weights() -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in FrameVae(FrameVaeConfig()).parameters())


def codec_work(config: ModelConfig) -> int:
    return 0 if config.codec == FITTED_CODEC else WAN_CODEC_AT_WORK


def buffer_bytes(network: Network, layout: Layout) -> int:
    """ZeRO's two buckets, of which one is filled while the other is reduced, and its gathered weights."""
    if not layout.stage:
        return 0
    buckets = 2 * FLOAT32 * min(BUCKET, network.num_trained)
    gathered = network.weight_bytes * min(1.0, STAGE_3_LIVE / network.num_weights)
    return buckets + (int(gathered) if layout.stage == 3 else 0)


def _weight_copies(network: Network, layout: Layout, modes: list[str]) -> int:
    """Autocast's bfloat16 copies of weights: of all, or under ZeRO of blocks that are not run again."""
    if not layout.is_bf16 or network.num_trained < network.num_weights:
        return 0
    copied = network.block_weights * modes.count("none") if layout.stage else network.num_weights
    return BF16 * copied


def _block_modes(config, num_tokens: int, layout: Layout, other_bytes: int) -> list[str]:
    if layout.checkpointing != "auto":
        return [layout.checkpointing] * config.num_layers
    if layout.gpu_bytes is None:
        return ["none"] * config.num_layers
    free = layout.gpu_bytes - other_bytes - RESERVED_BYTES
    return fitting_modes(config, num_tokens, (FLOAT32, layout.compute_size), free)

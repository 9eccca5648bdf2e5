"""The memory model against what torch allocates: states to the byte, activations within a tolerance."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.lora import LoraSettings, add_lora, cast_base
from train.costs.memory_model import (
    GIB,
    Layout,
    Network,
    kept_bytes,
    state_bytes,
    training_memory,
    working_bytes,
)
from train.ema import Ema
from train.optimizer import OptimizerConfig, build_optimizer
from train.parts import ModelConfig
from train.processes.trained_state import TrainedState

SMALL = ModelConfig("tiny", num_layers=2, codec="pca", caption_encoder="words")
ALONE = Layout("auto", 1, False, 1, True, "none", False, None)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_states_are_those_that_torch_allocates(lora):
    config = replace(SMALL, base_weights="base", codec="wan", lora=lora) if lora else SMALL
    dit = StoryDiT(config.dit_config)
    if lora:
        add_lora(dit, lora)
        cast_base(dit, torch.bfloat16)
    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(dit, OptimizerConfig(lr=1e-3), 1.0)
    optimizer.step()
    ema = Ema(TrainedState.of(dit, optimizer), 0.9)
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    num_bytes = lambda tensors: sum(tensor.nbytes for tensor in tensors)  # noqa: E731
    assert state_bytes(Network.of(config), ALONE) == {
        "weights": num_bytes(dit.parameters()),
        "gradients": num_bytes(parameter.grad for parameter in trained),
        "masters": 0,
        "moments": num_bytes(states),
        "average (EMA)": num_bytes(ema.average),
    }


def tracked(config: StoryDiTConfig, mode: str, num_frames: int, is_bf16: bool) -> tuple[int, int]:
    """(bytes kept after the forward, bytes at the peak of forward and backward), as torch tracks them.

    Of tensors without memory, so that the sizes are those of real clips: 480 x 832, Wan's 512 rows of text.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        dit = StoryDiT(config)
        dit.set_activation_checkpointing(mode)
        inputs = [torch.zeros(num_frames, config.in_channels, 60, 104)]
        text = torch.zeros(512, config.text_dim)
        caption = (torch.zeros(77, config.clip_text_dim), text) if config.clip_text_dim else text
        tracker = MemTracker()
        tracker.track_external(dit)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16, cache_enabled=False):
                loss = dit(inputs, torch.zeros(1), None, [caption])[0].float().square().mean()
            kept = tracker.get_tracker_snapshot("current")
            loss.backward()
        peak = tracker.get_tracker_snapshot("peak")
    return tuple(sum(device["Total"] for device in snapshot.values()) for snapshot in (kept, peak))


@pytest.mark.parametrize(
    ("preset", "mode", "is_bf16"),
    [
        ("wan-1.3b", "none", True),
        ("step-4b", "selective", True),
        pytest.param("wan-1.3b", "full", True, marks=pytest.mark.slow),
        pytest.param("wan-1.3b", "none", False, marks=pytest.mark.slow),
        pytest.param("step-4b", "full", True, marks=pytest.mark.slow),
        pytest.param("wan-14b", "selective", True, marks=pytest.mark.slow),
        pytest.param("wan-14b", "none", True, marks=pytest.mark.slow),
    ],
)
def test_activations_are_not_less_than_torch_counts_and_not_much_more(preset, mode, is_bf16):
    config = replace(StoryDiTConfig.preset(preset), num_layers=2)
    kept, peak = tracked(config, mode, 8, is_bf16)
    tokens, modes, size = 8 * 30 * 52, [mode] * 2, 2 if is_bf16 else 4
    network = Network.of(ModelConfig(preset, num_layers=2, codec="pca", caption_encoder="words"))
    copies = 2 * 2 * network.block_weights if is_bf16 and mode == "none" else 0
    work = working_bytes(network, config, tokens, mode != "none", size)
    begins = network.weight_bytes + copies + kept_bytes(config, tokens, modes, size)
    gradients = 4 * network.block_weights  # of the last block, when the first one's backward runs
    ends = network.weight_bytes + gradients + kept_bytes(config, tokens, modes[:1], size)
    assert begins == pytest.approx(kept, rel=0.03)
    assert peak <= max(begins, ends) + work <= 1.25 * peak


def test_zero_shares_out_more_with_every_stage():
    network, W = Network.of(SMALL), 8
    T = network.num_trained
    of = {name: state_bytes(network, replace(ALONE, strategy=name, world_size=W)) for name in
          ("ddp", "zero1", "zero2", "zero3")}  # fmt: skip
    totals = {name: sum(parts.values()) / 4 / T for name, parts in of.items()}
    expected = {"ddp": 5, "zero1": 2 + 4 / W, "zero2": 1 + 5 / W, "zero3": 6 / W}  # of 4 bytes a weight
    assert totals == pytest.approx(expected, rel=1e-4)


def test_a_longer_pack_never_takes_less_and_auto_stays_below_the_limit():
    config = ModelConfig("wan-1.3b", codec="wan", caption_encoder="umt5")
    network = Network.of(config)
    layout = replace(ALONE, strategy="zero2", world_size=8, checkpointing="full", gpu_bytes=79 * GIB)
    sizes = [
        training_memory(network, config, layout, n, text_encoder=True).total for n in range(0, 90_000, 9000)
    ]
    assert sizes == sorted(sizes)
    auto = replace(layout, checkpointing="auto")
    memories = [training_memory(network, config, auto, n, text_encoder=True) for n in (9360, 37440, 80_000)]
    assert all(memory.total <= 79 * GIB for memory in memories)
    num_none = [memory.block_modes.count("none") for memory in memories]
    assert num_none == sorted(num_none, reverse=True) and num_none[0] > num_none[-1]


def test_half_the_tokens_a_rank_with_sequence_parallelism():
    config = ModelConfig("wan-14b", codec="wan", caption_encoder="umt5")
    layout = replace(ALONE, strategy="zero3", world_size=64, checkpointing="full", gpu_bytes=79 * GIB)
    of = lambda layout, tokens: training_memory(  # noqa: E731
        Network.of(config), config, layout, tokens, text_encoder=False
    ).parts["activations"]
    assert of(replace(layout, sequence_parallel=2), 80_000) == of(layout, 40_000)

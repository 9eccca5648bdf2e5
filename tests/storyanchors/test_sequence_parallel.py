"""Two processes that share every clip's tokens compute what one computes: velocities and gradients."""

import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.lora import LoraSettings, add_lora
from storyanchors.packing import cut_segments
from storyanchors.sequence_parallel import check_degree, share_tokens, whole_sequences

SIZES = dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, ffn_dim=48, text_dim=12)
WAN = StoryDiTConfig(**SIZES, latent_channels=3, freq_dim=32)
STEP_VIDEO = StoryDiTConfig(
    **SIZES, latent_channels=3, freq_dim=32, frame_number_embedding=True, norm_affine=True,
    cross_attn_norm=False, qk_norm="rms_norm", linear_bias=False, text_norm=True, reversed_flow=True,
)  # fmt: skip
MIXED = [(4, 4, 6, 5), (1, 8, 2, 1), (3, 2, 2, 9), (6, 4, 4, 2)]  # frames, height, width, caption tokens
PACKS = {
    "mixed": MIXED,  # 24, 4, 3, 24 tokens: the cut is in the second clip
    "one odd clip": [(5, 2, 6, 3)],  # 15 tokens
    "cut between clips": [(2, 4, 4, 3), (1, 4, 8, 2)],  # 8 and 8
    "one long clip": [(2, 2, 2, 2), (9, 4, 4, 4)],  # the second rank has nothing of the first
}
CASES = {  # config, pack, activation checkpointing, what else
    **{f"wan, {pack}": (WAN, pack, "none", None) for pack in PACKS},
    "step-video": (STEP_VIDEO, "mixed", "none", None),
    **{f"wan, {mode}": (WAN, "mixed", mode, None) for mode in ("selective", "full", "auto")},
    "step-video, selective": (STEP_VIDEO, "one odd clip", "selective", None),
    "lora": (WAN, "mixed", "none", "lora"),
    "lora, full": (STEP_VIDEO, "one long clip", "full", "lora"),
    "compiled, selective": (WAN, "one odd clip", "selective", "compiled"),
    "bfloat16": (WAN, "mixed", "none", "bfloat16"),
    "bfloat16, selective": (WAN, "mixed", "selective", "bfloat16"),
}


def make_dit(case: str) -> StoryDiT:
    config, _, mode, more = CASES[case]
    dit = StoryDiT(config)
    if more == "lora":
        add_lora(dit, LoraSettings(rank=2, alpha=3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.2, generator=generator)
    dit.set_activation_checkpointing(mode)
    if more == "compiled" and dist.is_initialized():
        dit.compile_blocks(backend="eager")  # traced as for inductor, not translated, which takes a minute
    return dit


def velocities(dit: StoryDiT, case: str) -> list[Tensor]:
    _, pack, _, more = CASES[case]
    generator = torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=generator)
    inputs = [randn(F, 7, H, W) for F, H, W, _ in PACKS[pack]]
    captions = [randn(L, 12) for *_, L in PACKS[pack]]
    conditions = [ClipConditions(fps=24 + i, motion=i or None) for i in range(len(inputs))]
    timesteps = torch.linspace(50, 990, len(inputs))
    with torch.autocast("cpu", torch.bfloat16, enabled=more == "bfloat16"):
        return dit(inputs, timesteps, conditions, captions)


def run(dit: StoryDiT, case: str) -> dict[str, Tensor]:
    """The velocity of every clip and the gradient of every trained weight."""
    found = velocities(dit, case)
    sum(velocity.float().square().mean() for velocity in found).backward()
    trained = {name: p.grad for name, p in dit.named_parameters() if p.requires_grad}
    return {**{f"velocity {i}": velocity.detach() for i, velocity in enumerate(found)}, **trained}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=30), world_size=2, rank=rank)
    results = {case: run_in_group(case) for case in CASES}
    dit = make_dit("step-video")
    dit.set_sequence_parallel(dist.group.WORLD)
    if rank == 0:  # alone
        with torch.no_grad(), whole_sequences(dit):
            results["whole"] = {"velocity": velocities(dit, "step-video")[0]}
        with pytest.raises(ValueError, match="1 video tokens cannot be split over 2 ranks"):
            share_tokens([1], dit.sequence_group)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_in_group(case: str) -> dict[str, Tensor]:
    dit = make_dit(case)
    dit.set_sequence_parallel(dist.group.WORLD)
    found = run(dit, case)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2  # the mean, as DDP takes it
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    deadline = time.monotonic() + 120
    processes = mp.spawn(work, (port, str(folder)), nprocs=2, join=False)
    try:
        while not processes.join(timeout=60):  # returns when one has come to its end
            assert time.monotonic() < deadline, "the two processes do not come to an end"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_computes(two_processes, case):
    expected = run(make_dit(case), case)
    for found in two_processes:
        assert found[case].keys() == expected.keys()
        for name, tensor in expected.items():
            if "bfloat16" in case:
                difference = (found[case][name].float() - tensor.float()).norm()
                assert difference <= 0.03 * tensor.float().norm(), name
                continue
            message = partial("{0}: {1}".format, name)
            torch.testing.assert_close(found[case][name], tensor, atol=1e-5, rtol=1e-5, msg=message)


def test_every_rank_has_the_whole_velocity_and_the_same(two_processes):
    for case in CASES:
        one, other = (found[case] for found in two_processes)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rank_can_compute_alone(two_processes):
    with torch.no_grad():
        expected = velocities(make_dit("step-video"), "step-video")[0]
    torch.testing.assert_close(two_processes[0]["whole"]["velocity"], expected)


@pytest.mark.parametrize("degree", [0, 5, 8])
def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do(degree):
    with pytest.raises(ValueError, match=rf"={degree} does not divide the 12 .*possible: 1, 2, 3, 4, 6, 12"):
        check_degree(degree, 12)


@pytest.mark.parametrize(
    ("start", "end", "clips", "parts"),
    [
        (0, 10, slice(0, 3), [3, 5, 2]),
        (0, 3, slice(0, 1), [3]),
        (3, 10, slice(1, 3), [5, 2]),
        (2, 4, slice(0, 2), [1, 1]),
        (4, 6, slice(1, 2), [2]),
    ],
)
def test_segments_are_cut_at_tokens(start, end, clips, parts):
    assert cut_segments([3, 5, 2], start, end) == (clips, parts)


def test_without_a_group_a_share_is_everything():
    share = share_tokens([3, 5], None)
    assert (share.tokens, share.clips, share.lengths) == (slice(0, 8), slice(0, 2), [3, 5])

"""A training step's forward and backward: our packed network against diffusers' Wan, on the same clips.

python benchmarks/dit_step.py                                                  # small, on a CPU
python benchmarks/dit_step.py --model wan-1.3b --device cuda --compile         # one H100 or H200
python benchmarks/dit_step.py --model step-4b  --device cuda --compile

Both networks have the same weights and take turns in one process; the largest difference of their outputs is
printed. diffusers' network has no mask for padded tokens, so that clips of several sizes can only be run one
by one; the padded batches are what it would cost to pad them, and their outputs are not even right. No class
of diffusers has Step-Video's block: for step-4b the other side is Wan's block of the same width, depth and
feed-forward, and there are no outputs to compare.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from timing import Timing, describe_machine, take_turns
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from storyanchors.attention import describe_kernel
from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.flops import ClipSize, model_flops, num_tokens
from storyanchors.modulation import modulated_norm
from storyanchors.weights import load_base_weights

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 (data sheet); MFU is relative to it
SMALL = StoryDiTConfig(num_attention_heads=8, attention_head_dim=64, num_layers=4, ffn_dim=2048, text_dim=512)
SMALL_SIZES = [(8, 16, 26), (4, 26, 16), (6, 20, 20), (9, 16, 40)]  # landscape, portrait, square, wide
SMALL_CLIPS = [ClipSize(*size, caption_tokens=128) for size in SMALL_SIZES]
LARGE_SIZES = [(8, 60, 104), (12, 60, 104), (6, 78, 78), (10, 104, 60)]  # 480 x 832 pixels and others
LARGE_CLIPS = [ClipSize(*size, caption_tokens=512) for size in LARGE_SIZES]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", choices=["small", "wan-1.3b", "step-4b"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also both networks under torch.compile")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = SMALL if args.model == "small" else StoryDiTConfig.preset(args.model)
    clips = SMALL_CLIPS if args.model == "small" else LARGE_CLIPS
    print(f"{args.model}, {dtype}, {describe_machine(device)}")
    print(f"clips: {', '.join(f'{num_tokens(config, clip)} tokens' for clip in clips)}")
    compare_norms(config, clips, dtype, device, args.rounds, args.warmup)
    compare_steps(config, clips, dtype, device, args.compile, args.rounds, args.warmup)


def compare_steps(
    config: StoryDiTConfig,
    clips: Sequence[ClipSize],
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    rounds: int,
    warmup: int,
) -> None:
    ours, theirs = make_networks(config, dtype, device)
    same_block = config.clip_text_dim is None
    modes = ("full", "selective", "auto") if device.type == "cuda" else ("none",)
    kernel = describe_kernel(device, dtype, config.attention_head_dim)
    print(f"\nforward and backward; attention: {kernel}; {len(clips)} clips")

    one_by_one = partial(their_step, theirs, clips)
    largest = max(clips, key=lambda clip: num_tokens(config, clip))
    around_all = ClipSize(*(max(sizes) for sizes in zip(*clips, strict=True)))
    candidates: dict[str, Callable[[], object]] = {"diffusers, clip by clip": one_by_one}
    if device.type == "cuda":
        theirs.enable_gradient_checkpointing()
    else:
        padded = partial(their_padded_step, theirs, num_clips=len(clips))
        candidates["diffusers, padded to the longest"] = partial(padded, largest)
        candidates["diffusers, padded to (F, H, W)"] = partial(padded, around_all)
    for mode in modes:
        last = f"ours, packed, checkpointing {mode}"
        candidates[last] = partial(our_step, ours, clips, mode)
    print(f"kernels: {', '.join(attention_kernels(candidates[last], device))}")
    if same_block:
        print(f"largest difference of the outputs: {output_difference(ours, theirs, clips):.1e}")
    timings = take_turns(candidates, rounds=rounds, warmup=warmup, device=device)
    report(timings, "diffusers, clip by clip", config, clips, device)
    if not compiled:
        return
    ours.compile_blocks()
    theirs.compile_repeated_blocks(fullgraph=True)
    candidates = {"diffusers, compiled, clip by clip": one_by_one}
    for mode in modes:
        candidates[f"ours, compiled, packed, checkpointing {mode}"] = partial(our_step, ours, clips, mode)
    timings = take_turns(candidates, rounds=rounds, warmup=warmup, device=device)
    report(timings, "diffusers, compiled, clip by clip", config, clips, device)


def report(
    timings: dict[str, Timing],
    baseline: str,
    config: StoryDiTConfig,
    clips: Sequence[ClipSize],
    device: torch.device,
) -> None:
    flops = 3 * model_flops(config, clips)  # of the clips alone: padding and recomputing are no model FLOPs
    for name, timing in timings.items():
        rate = flops / timing.median
        use = f"  MFU {rate / PEAK_FLOPS:5.1%}" if device.type == "cuda" else f"  {rate / 1e9:6.0f} GFLOP/s"
        print(f"{name:<48}{timing}{use}  {timings[baseline].median / timing.median:5.2f} x")


def make_networks(
    config: StoryDiTConfig, dtype: torch.dtype, device: torch.device
) -> tuple[StoryDiT, WanTransformer3DModel]:
    """Ours and diffusers', with the same random weights where the blocks are the same."""
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        rope_max_seq_len=1024,
    )
    ours = StoryDiT(config)
    if config.clip_text_dim is None:
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            load_base_weights(ours, Path(folder))
    for network in (ours, theirs):
        network.requires_grad_(True)
        for name, parameter in network.named_parameters():
            keeps = any(part in name for part in network._keep_in_fp32_modules)
            parameter.data = parameter.data.to(device, torch.float32 if keeps else dtype)
        for name, buffer in network.named_buffers():
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, buffer.to(device))
    return ours, theirs


def our_step(network: StoryDiT, clips: Sequence[ClipSize], mode: str) -> None:
    """All clips in one packed forward, then the backward."""
    network.set_activation_checkpointing(mode)
    backward(our_forward(network, clips))


def our_forward(network: StoryDiT, clips: Sequence[ClipSize]) -> list[Tensor]:
    latents = [draw_latents(clip, network) for clip in clips]
    none_given = [torch.zeros(clip.num_frames, device=network.device) for clip in clips]
    inputs = [
        stack_condition_channels(noisy, torch.zeros_like(noisy), mask)
        for noisy, mask in zip(latents, none_given, strict=True)
    ]
    captions = [draw_caption(clip, network) for clip in clips]
    if network.config.clip_text_dim is not None:
        captions = [(caption.new_zeros(77, network.config.clip_text_dim), caption) for caption in captions]
    timesteps = torch.full((len(clips),), 500.0, device=network.device)
    return network(inputs, timesteps, [ClipConditions()] * len(clips), captions)


def their_step(network: WanTransformer3DModel, clips: Sequence[ClipSize]) -> None:
    """One clip after another; gradients add up."""
    for clip in clips:
        backward([their_forward(network, clip)])


def their_padded_step(network: WanTransformer3DModel, clip: ClipSize, num_clips: int) -> None:
    """As many clips as there are, all of this size, in one batch."""
    backward([their_forward(network, clip, num_clips)])


def their_forward(network: WanTransformer3DModel, clip: ClipSize, num_clips: int = 1) -> Tensor:
    """(num_clips, C, F, H, W)"""
    latents = draw_latents(clip, network).movedim(1, 0).expand(num_clips, -1, -1, -1, -1)
    captions = draw_caption(clip, network).expand(num_clips, -1, -1)
    timesteps = torch.full((num_clips,), 500.0, device=network.device)
    return network(latents, timesteps, captions, return_dict=False)[0]


def backward(velocities: Sequence[Tensor]) -> None:
    sum(velocity.float().square().mean() for velocity in velocities).backward()


def attention_kernels(step: Callable[[], object], device: torch.device) -> list[str]:
    """What computed the attention of one step, by the profiler."""
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
    names = {event.key for event in profiler.key_averages() if "Backward0" not in event.key}
    return sorted(name for name in names if re.search("attention|flash|fmha|sdpa", name, re.IGNORECASE))


def output_difference(ours: StoryDiT, theirs: WanTransformer3DModel, clips: Sequence[ClipSize]) -> float:
    with torch.no_grad():
        velocities = [their_forward(theirs, clip)[0].movedim(0, 1) for clip in clips]
        pairs = zip(our_forward(ours, clips), velocities, strict=True)
        return max((one - other).abs().max().item() for one, other in pairs)


def draw_latents(clip: ClipSize, network) -> Tensor:
    """(F, C, H, W), the same for the same size."""
    config = network.config
    channels = config.latent_channels if isinstance(network, StoryDiT) else config.in_channels
    return draw((clip.num_frames, channels, clip.height, clip.width), network)


def draw_caption(clip: ClipSize, network) -> Tensor:
    return draw((clip.caption_tokens, network.config.text_dim), network)


def draw(shape: tuple[int, ...], network) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(network.device, network.proj_out.weight.dtype)


def compare_norms(
    config: StoryDiTConfig,
    clips: Sequence[ClipSize],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    warmup: int,
) -> None:
    """LayerNorm with a shift and scale for each clip: ours against a row gathered for each token."""
    lengths = [num_tokens(config, clip) for clip in clips]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), config.hidden_dim), *[(len(clips), config.hidden_dim)] * 2]
    x, scale, shift = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    x, target = x.to(dtype), torch.randn(shapes[0], generator=generator).to(device, dtype)
    clip_of_token = torch.arange(len(clips), device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )

    def gathered(x, scale, shift):
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=config.eps)
        return (normed * (1 + scale[clip_of_token]) + shift[clip_of_token]).to(dtype)

    def ours(x, scale, shift):
        return modulated_norm(x, scale, shift, lengths, eps=config.eps, dtype=dtype)

    def gradients(function, arguments) -> Sequence[Tensor]:
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        return torch.autograd.grad(function(*arguments), arguments, target)

    arguments = (x, scale, shift)
    candidates = {
        "gathered": partial(gradients, gathered, arguments),
        "ours": partial(gradients, ours, arguments),
    }
    timings = take_turns(candidates, rounds=2 * rounds, warmup=warmup, device=device)
    pairs = zip(gradients(ours, arguments), gradients(gathered, arguments), strict=True)
    largest = max(((one - other).norm() / other.norm()).item() for one, other in pairs)
    print(f"\nmodulated norm, forward and backward, {shapes[0][0]} x {shapes[0][1]}")
    for name, timing in timings.items():
        print(f"{name:<48}{timing}  {timings['gathered'].median / timing.median:5.2f} x")
    print(f"largest relative difference of the gradients: {largest:.1e}")


if __name__ == "__main__":
    main()

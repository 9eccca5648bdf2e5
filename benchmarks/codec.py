"""Encoding and decoding of story frames: WanCodec against diffusers' AutoencoderKLWan, on the same frames.

python benchmarks/codec.py                                # small frames, on a CPU
python benchmarks/codec.py --device cuda --compile        # 480p and 720p in bfloat16 and float32, on one GPU

Both have the same random weights, at the released size, and take turns in one process; the largest difference
of what they make is printed. diffusers' model gets all frames as one batch of one-frame clips. float32 on a
GPU is TF32 inside convolutions, torch's default, on both sides.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from timing import describe_machine, take_turns
from torch import Tensor

from storyanchors.codec import WanCodec

SMALL = [(2, 160, 272)]  # frames, height and width in pixels
LARGE = [(16, 480, 832), (8, 720, 1280)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also WanCodec under torch.compile")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    print(describe_machine(device))
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
        theirs, ours = make_codecs(dtype, device)
        for num_frames, height, width in LARGE if on_gpu else SMALL:
            print(f"\n{num_frames} frames of {height} x {width} pixels, {dtype}")
            generator = torch.Generator().manual_seed(0)
            frames = (torch.rand(num_frames, 3, height, width, generator=generator) * 2 - 1).to(device, dtype)
            latents = ours.encode(frames)
            for verb, x in (("encode", frames), ("decode", latents)):
                compare(verb, x, theirs, ours, args.compile, args.rounds, args.warmup, device)


def compare(
    verb: str,
    x: Tensor,
    theirs: AutoencoderKLWan,
    ours: WanCodec,
    compiled: bool,
    rounds: int,
    warmup: int,
    device: torch.device,
) -> None:
    their_verb = partial(their_encode if verb == "encode" else their_decode, theirs, ours)
    our_verb = getattr(ours, verb)
    candidates: dict[str, Callable[[], object]] = {
        f"{verb}, diffusers": partial(their_verb, x),
        f"{verb}, ours": partial(our_verb, x),
    }
    if compiled:
        candidates[f"{verb}, ours, compiled"] = partial(torch.compile(our_verb, dynamic=False), x)
    difference = (their_verb(x) - our_verb(x)).abs().max().item()
    timings = take_turns(candidates, rounds=rounds, warmup=warmup, device=device)
    baseline = timings[f"{verb}, diffusers"].median
    for name, timing in timings.items():
        rate = len(x) / timing.median
        print(f"{name:<24}{timing}  {rate:7.2f} frames/s  {baseline / timing.median:5.2f} x")
    print(f"{verb}, largest difference: {difference:.1e}")


def make_codecs(dtype: torch.dtype, device: torch.device) -> tuple[AutoencoderKLWan, WanCodec]:
    torch.manual_seed(0)
    theirs = AutoencoderKLWan().eval().requires_grad_(False)
    ours = WanCodec.from_vae(theirs)
    return torch.nn.Module.to(theirs, device, dtype), ours.to(device, dtype)  # diffusers' own `to` warns


@torch.no_grad()
def their_encode(vae: AutoencoderKLWan, codec: WanCodec, frames: Tensor) -> Tensor:
    means = vae.encode(frames.unsqueeze(2)).latent_dist.mode().squeeze(2)
    return (means - codec.mean) / codec.std


@torch.no_grad()
def their_decode(vae: AutoencoderKLWan, codec: WanCodec, latents: Tensor) -> Tensor:
    return vae.decode((latents * codec.std + codec.mean).unsqueeze(2)).sample.squeeze(2)


if __name__ == "__main__":
    main()

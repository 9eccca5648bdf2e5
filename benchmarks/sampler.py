"""Sampling: our StoryGenerator against diffusers' WanPipeline; same weights, steps, guidance and noise.

OMP_NUM_THREADS=1 python benchmarks/sampler.py                       # small, on a CPU, in float32
OMP_NUM_THREADS=1 python benchmarks/sampler.py --dtype bfloat16
python benchmarks/sampler.py --model wan-1.3b --device cuda --compile      # one H100 or H200

The weights are random; storyanchors.diffusers_export hands them to diffusers. Each story frame is one latent,
and diffusers draws a video of as many latent frames. Both make the text embeddings, take the same noise and
the same sigmas through Euler steps with guidance, and the largest difference of the latents is printed,
relative to the largest latent. Decoding stands apart: diffusers' pipeline decodes latents as a video of
4 (F - 1) + 1 frames, or, for the frames that we make, each as a clip of its own.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from timing import Timing, describe_machine, take_turns
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from storyanchors.caption_encoder import Umt5Encoder
from storyanchors.codec import WanCodec
from storyanchors.conditioning import ClipConditions
from storyanchors.diffusers_export import save_diffusers_wan
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.flow import sampling_sigmas
from storyanchors.generator import StoryGenerator
from storyanchors.packed_sampling import NoisyClip, sample_clips
from storyanchors.rotary import rope_table
from storyanchors.story import Event, Story
from storyanchors.story_request import SamplerSettings
from storyanchors.story_world import sample_story, to_story

SHIFT, GUIDANCE = 5.0, 5.0
SHIPPED = "examples/story_world_model"
CAPTION = "[1-3] the fox runs in the snow. [4-8] the fox sleeps in a cave, seen from far away. a fox. flat"


@dataclasses.dataclass(frozen=True)
class Size:
    config: StoryDiTConfig
    frames: int
    height: int  # pixels
    width: int
    steps: int
    vae_dim: int  # width of the VAE; 96 is the published one


SIZES = {
    "small": Size(
        StoryDiTConfig(8, 64, num_layers=4, ffn_dim=2048, text_dim=512),
        frames=8, height=128, width=208, steps=2, vae_dim=16,
    ),
    "wan-1.3b": Size(StoryDiTConfig.preset("wan-1.3b"), 12, 480, 832, steps=20, vae_dim=96),
}  # fmt: skip


class OurSigmas(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on the sigmas of our sampler; its own end at 1/1000 before 0."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        super().set_timesteps(sigmas=sampling_sigmas(num_inference_steps, SHIFT)[:-1].tolist(), device=device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", choices=SIZES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also both networks under torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    args = parser.parse_args()
    device, size = torch.device(args.device), SIZES[args.model]
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    turns = partial(take_turns, rounds=args.rounds, warmup=args.warmup, device=device)
    torch.manual_seed(0)
    with torch.inference_mode():
        vae = AutoencoderKLWan(base_dim=size.vae_dim).to(device).eval().requires_grad_(False)
        generator = make_generator(size, vae, dtype, device)
        pipeline = make_pipeline(generator, vae)
        noise = torch.randn(size.frames, 16, size.height // 8, size.width // 8, device=device)
        print(f"{args.model}, {dtype}, {describe_machine(device)}")
        tokens = size.frames * size.height * size.width // 256
        print(f"{size.frames} frames of {size.height} x {size.width}: {tokens} tokens, {size.steps} steps")
        ours, theirs = our_latents(generator, size, noise), their_latents(pipeline, size, noise)
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        print(f"largest difference of the latents: {difference:.1e} of the largest")
        samplers: dict[str, Callable[[], object]] = {
            "diffusers, latents": partial(their_latents, pipeline, size, noise),
            "ours, latents": partial(our_latents, generator, size, noise),
        }
        report("latents from the prompt", turns(samplers))
        report("what the two halves of guidance take", turns(half_candidates(generator, size, noise)))
        report("of one step, what every step does again", turns(step_parts(generator, size, noise)))
        report("pictures from the latents", turns(decoders(generator, pipeline, theirs)))
        story = Story([Event(1, size.frames, "the fox runs")])
        report_overhead("one generate() call", generator, story, CAPTION)
        if device.type == "cpu":
            shipped = StoryGenerator.from_pretrained(SHIPPED, dtype=dtype)
            story = to_story(sample_story(0, num_frames=7))
            report_overhead(f"one generate() call of {SHIPPED}", shipped, story, story.prompt())
        if args.compile:
            generator.dit.compile_blocks()
            pipeline.transformer.compile_repeated_blocks(fullgraph=True)
            report("latents from the prompt, compiled", turns(samplers))


def report(title: str, timings: dict[str, Timing]) -> None:
    first = next(iter(timings.values()))
    print(f"\n{title}")
    for name, timing in timings.items():
        print(f"{name:<48}{timing}  {first.median / timing.median:5.2f} x")


def make_generator(
    size: Size, vae: AutoencoderKLWan, dtype: torch.dtype, device: torch.device
) -> StoryGenerator:
    """Ours: a random network and text encoder of Wan's kinds."""
    dit = StoryDiT(size.config).eval().requires_grad_(False)
    dit.cast(dtype)
    words = ["\u2581the", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789[].,-"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -9.0) for word in words)]
    text_config = UMT5Config(
        vocab_size=len(vocabulary),
        d_model=size.config.text_dim,
        d_kv=64,
        num_heads=8,
        d_ff=1024,
        num_layers=2,
    )
    encoder = Umt5Encoder(UMT5EncoderModel(text_config), T5Tokenizer(vocab=vocabulary, extra_ids=0))
    return StoryGenerator(
        dit.to(device),
        WanCodec.from_vae(vae).to(device),
        encoder.to(device, dtype),
        frame_size=(size.height, size.width),
        num_steps=size.steps,
        guidance_scale=GUIDANCE,
        shift=SHIFT,
    )


def make_pipeline(generator: StoryGenerator, vae: AutoencoderKLWan) -> WanPipeline:
    """diffusers' pipeline of the same weights."""
    dit, encoder = generator.dit, generator.caption_encoder
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers_wan(dit, Path(folder))
        transformer = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dit.dtype)
    scheduler = OurSigmas(num_train_timesteps=1000)
    pipeline = WanPipeline(encoder.tokenizer, encoder.model, vae, scheduler, transformer.eval())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dit.device)


def our_latents(generator: StoryGenerator, size: Size, noise: Tensor) -> Tensor:
    """(F, C, h, w)"""
    caption, negative = generator.caption_encoder.encode([CAPTION, ""])
    settings = generator.full_settings(SamplerSettings())
    clip = unknown_clip(noise)
    return sample_clips(generator.dit, [clip], [caption], negative, settings, lambda *_: None)[0]


def unknown_clip(noise: Tensor) -> NoisyClip:
    """A clip of which no frame is given and no condition is known: what diffusers' network can draw."""
    return NoisyClip(noise, torch.zeros_like(noise), noise.new_zeros(len(noise)), ClipConditions())


def their_latents(pipeline: WanPipeline, size: Size, noise: Tensor) -> Tensor:
    """(F, C, h, w)"""
    latents = pipeline(
        CAPTION,
        negative_prompt="",
        height=size.height,
        width=size.width,
        num_frames=4 * (size.frames - 1) + 1,
        num_inference_steps=size.steps,
        guidance_scale=GUIDANCE,
        latents=noise.movedim(1, 0)[None],  # (1, C, F, h, w)
        output_type="latent",
    ).frames
    return latents[0].movedim(0, 1)


def half_candidates(generator: StoryGenerator, size: Size, noise: Tensor) -> dict[str, Callable]:
    """One guided step: both halves in one packed forward, as we do it, or one after the other."""
    dit, captions = generator.dit, generator.caption_encoder.encode([CAPTION, ""])
    inputs = torch.cat([noise, torch.zeros_like(noise), noise.new_zeros(len(noise), 1, *noise.shape[2:])], 1)
    timesteps = torch.full((2,), 500.0, device=noise.device)
    return {
        "two calls": lambda: [dit([inputs], timesteps[:1], None, [caption]) for caption in captions],
        "one packed call (ours)": lambda: dit([inputs, inputs], timesteps, None, captions),
    }


def step_parts(generator: StoryGenerator, size: Size, noise: Tensor) -> dict[str, Callable]:
    """A guided step, and those of its parts that are the same in every step and could be kept."""
    dit, captions = generator.dit, generator.caption_encoder.encode([CAPTION, ""])
    grids = [(size.frames, size.height // 16, size.width // 16)] * 2

    def caption_keys() -> None:
        caption_LD, _ = dit.condition_embedder.embed_captions(captions, dit.dtype)
        for block in dit.blocks:
            block.attn2.norm_k(block.attn2.to_k(caption_LD))
            block.attn2.to_v(caption_LD)

    return {
        "a guided step": half_candidates(generator, size, noise)["one packed call (ours)"],
        "text embedding, keys and values of the captions": caption_keys,
        "clip conditions": lambda: dit.story_embedder([ClipConditions()] * 2, noise.device),
        "rotary table": lambda: rope_table(grids, dit.rope_axes, noise.device),
        "encoding both captions (once in a call)": lambda: generator.caption_encoder.encode([CAPTION, ""]),
    }


def decoders(generator: StoryGenerator, pipeline: WanPipeline, latents: Tensor) -> dict[str, Callable]:
    mean, std = (getattr(generator.codec, name)[None] for name in ("mean", "std"))  # (1, C, 1, 1)
    raw = latents.float() * std + mean
    frames, video = raw[:, :, None], raw.movedim(1, 0)[None]  # (F, C, 1, h, w), (1, C, F, h, w)
    return {
        "diffusers, a video of 4 (F - 1) + 1 frames": lambda: pipeline.vae.decode(video),
        "diffusers, each frame alone": lambda: pipeline.vae.decode(frames),
        "ours": lambda: generator.codec.decode(latents),
    }


def report_overhead(title: str, generator: StoryGenerator, story: Story, caption: str) -> None:
    """Where the time of a generate() call goes: all that is not the network should be below 5 %."""
    parts = {
        "network": (generator.dit, "forward"),
        "codec": (generator.codec, "decode"),
        "caption encoder": (generator.caption_encoder, "encode"),
    }
    with timed_parts(parts, generator.device) as seconds:
        generator.generate(story, caption=caption, num_steps=1, progress=False)  # fills the tables
        seconds.clear()
        start = clock(generator.device)
        generator.generate(story, caption=caption, progress=False)
        total = clock(generator.device) - start
    print(f"\n{title}: {story.num_frames} frames, {generator.num_steps} steps, {total:.3f} s")
    for name, spent in {**seconds, "everything else": total - sum(seconds.values())}.items():
        print(f"{name:<48}{spent:9.4f} s  {spent / total:6.2%}")


@contextmanager
def timed_parts(parts: dict[str, tuple[object, str]], device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in each of these methods."""
    seconds: dict[str, float] = {}

    def timed(name: str, method: Callable) -> Callable:
        def run(*args, **kwargs):
            start = clock(device)
            result = method(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + clock(device) - start
            return result

        return run

    for name, (owner, verb) in parts.items():
        setattr(owner, verb, timed(name, getattr(owner, verb)))
    yield seconds
    for owner, verb in parts.values():
        delattr(owner, verb)


def clock(device: torch.device) -> float:
    """CPU time leaves out what other programs take of a shared machine."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()

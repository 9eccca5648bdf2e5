"""What drawing a story takes of a GPU's memory, with the parts resident or offloaded. Counted, not run.

python benchmarks/sampling_memory.py > benchmarks/results/sampling_memory.txt

The network's forward and the codec's decode run on fake tensors, which have sizes and no numbers, and the
largest sum of living tensors is noted: parameters, activations, what kernels get and return. A kernel's own
workspace is not in it, nor are CUDA's context and the allocator's fragments, for which a tenth of the card
and half a GiB are left free here.
"""

import sys
import weakref
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from storyanchors.codec import WanCodec
from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.wan_vae import FrameVae, FrameVaeConfig

GIB = 2**30
UMT5_BYTES = 5.681e9 * 2  # UMT5-XXL's encoder in bfloat16, for Wan; Step-Video's captions come precomputed
CARDS = {"24 GB": 24, "80 GB": 80}  # GiB
MODELS = ("wan-1.3b", "step-4b", "wan-14b", "step-30b")
CLIPS = [(8, 480, 832), (12, 720, 1280), (24, 720, 1280)]


class PeakBytes(TorchDispatchMode):
    """The largest sum of storages that are alive at once, of those made inside; weights do not count."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = WeakIdKeyDictionary({one.untyped_storage(): True for one in module.parameters()})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def network(config: StoryDiTConfig) -> StoryDiT:
    dit = StoryDiT(config).eval()
    dit.cast(torch.bfloat16)
    return dit


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def forward_bytes(dit: StoryDiT, num_frames: int, height: int, width: int) -> int:
    """What a forward with guidance, two clips packed, takes beside the weights."""
    config, stride = dit.config, 16 // dit.config.patch_size[-1]
    shape = (num_frames, 2 * config.latent_channels + 1, height // stride, width // stride)
    text = torch.empty(512, config.text_dim, dtype=torch.bfloat16)
    caption = (text[:77, : config.clip_text_dim], text) if config.clip_text_dim else text
    with PeakBytes(dit) as peak:
        dit([torch.empty(shape)] * 2, torch.empty(2), [ClipConditions()] * 2, [caption] * 2)
    return peak.peak


def decode_bytes(codec: WanCodec, num_frames: int, height: int, width: int) -> int:
    with PeakBytes(codec.network) as peak:
        codec.decode(torch.empty(num_frames, 16, height // 8, width // 8))
    return peak.peak


def fits(needed: dict[str, float]) -> str:
    """The smallest card on which each memory mode fits."""
    found = {}
    for mode, size in needed.items():
        found[mode] = next((card for card, gib in CARDS.items() if size <= 0.9 * gib - 0.5), "neither")
    return "".join(f"{card:>10}" for card in found.values())


def main() -> None:
    print(__doc__.split("\n\n")[2].replace("\n", " "))
    print(
        "\nGiB; bfloat16, the codec in float32; guidance in one forward; 24 and 80 GB name the smallest card"
    )
    titles = ("weights", "encoder", "forward", "decode", "resident", "offload", "resident", "offload")
    print(f"{'model':10}{'frames':>20}" + "".join(f"{title:>10}" for title in titles))
    codec = WanCodec(FrameVae(FrameVaeConfig()), tiling=True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        decode = {clip: decode_bytes(codec, *clip) for clip in CLIPS}
        for model in MODELS:
            config = StoryDiTConfig.preset(model)
            with torch.device("meta"):
                weights = bytes_of(network(config))
            # without gradients every block takes the same, one after the other
            dit = network(replace(config, num_layers=2))
            encoder = UMT5_BYTES if model.startswith("wan") else 0
            for clip in CLIPS:
                own, forward = bytes_of(codec.network), forward_bytes(dit, *clip)
                resident = weights + encoder + own + max(forward, decode[clip])
                offload = max(encoder, weights + forward, own + decode[clip])
                sizes = [size / GIB for size in (weights, encoder, forward, decode[clip], resident, offload)]
                numbers = "".join(f"{size:10.1f}" for size in sizes)
                card = fits({"resident": sizes[4], "offload": sizes[5]})
                print(f"{model:10}{f'{clip[0]} x {clip[1]} x {clip[2]}':>20}{numbers}{card}", flush=True)


if __name__ == "__main__":
    main()

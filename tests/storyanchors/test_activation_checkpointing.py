"""What blocks keep and what they run again, by counting kernels and bytes."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from storyanchors.activation_checkpointing import activation_bytes, fitting_modes
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.flops import ClipSize, num_tokens

CONFIG = StoryDiTConfig(num_attention_heads=4, attention_head_dim=32, num_layers=2, ffn_dim=512, text_dim=16)
CLIP = ClipSize(9, 24, 24, caption_tokens=8)  # 1296 tokens: more than are attended without a kernel
GIB = 2**30


def forward(config: StoryDiTConfig, mode: str) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dit = StoryDiT(config)
        inputs = torch.randn(CLIP.num_frames, config.in_channels, CLIP.height, CLIP.width)
        caption = torch.randn(CLIP.caption_tokens, config.text_dim)
    dit.set_activation_checkpointing(mode)
    return dit([inputs], torch.tensor([500.0]), None, [caption])[0]


class KernelCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.__name__] = self.counts.get(op.__name__, 0) + 1
        return op(*args, **(kwargs or {}))

    def count(self, part: str) -> int:
        return sum(count for name, count in self.counts.items() if part in name and "backward" not in name)


@pytest.mark.parametrize(
    ("mode", "attention", "linear"), [("none", 0, 0), ("selective", 0, 1), ("full", 1, 1)]
)
def test_what_the_backward_runs_again(mode, attention, linear):
    """attention and linear: whether each block computes them a second time."""
    out = forward(CONFIG, mode)
    with KernelCounter() as kernels:
        out.sum().backward()
    assert kernels.count("scaled_dot_product") == attention * CONFIG.num_layers
    assert kernels.count("gelu") == linear * CONFIG.num_layers


def test_selective_does_not_mind_operators_that_come_in_the_backward_alone():
    """As ZeRO-3's hooks do, which gather a weight where it is missing."""
    dit = StoryDiT(CONFIG)
    dit.set_activation_checkpointing("selective")
    calls = []

    def gather(module, args):
        calls.append(torch.cat([args[0], args[0]]) if calls else None)

    dit.blocks[0].ffn.register_forward_pre_hook(gather)
    inputs = torch.randn(CLIP.num_frames, CONFIG.in_channels, CLIP.height, CLIP.width)
    caption = torch.randn(CLIP.caption_tokens, CONFIG.text_dim)
    dit([inputs], torch.tensor([500.0]), None, [caption])[0].sum().backward()
    assert len(calls) == 2 and calls[1] is not None


@pytest.mark.parametrize(("ffn_dim", "heads"), [(512, 4), (256, 4), (512, 2)])
def test_the_bytes_of_a_block_are_those_that_it_keeps(ffn_dim, heads):
    """The difference between three blocks and one, so that the ends of the network do not count."""
    kept = {}
    for num_layers in (1, 3):
        config = StoryDiTConfig(heads, 32, num_layers, ffn_dim, 16)
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor, storages=storages) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = (
                    tensor  # held, so that no address is used again
                )
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(config, "none")
        kept[num_layers] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    found = (kept[3] - kept[1]) / 2 / num_tokens(config, CLIP)
    assert found == pytest.approx(activation_bytes(config, "none", 4, 4), rel=0.1)


def test_auto_recomputes_no_more_than_the_memory_asks_for():
    config = StoryDiTConfig.preset("wan-1.3b")
    modes = [fitting_modes(config, 18720, (2, 2), free * GIB) for free in range(1, 140)]
    assert modes[0] == ["full"] * 30 and modes[-1] == ["none"] * 30
    num_none = [m.count("none") for m in modes]
    assert num_none == sorted(num_none) and len(set(num_none)) > 15  # memory by memory, no cliff
    for free, chosen in enumerate(modes, start=1):
        kept = 18720 * sum(activation_bytes(config, mode, 2, 2) for mode in chosen)
        assert kept <= 0.8 * free * GIB or set(chosen) == {"full"}


def test_auto_is_none_on_a_cpu():
    out = forward(CONFIG, "auto")
    with KernelCounter() as kernels:
        out.sum().backward()
    assert kernels.count("gelu") == 0

import pytest
import torch

from storyanchors.caption_encoder import WordEncoder
from storyanchors.dit import StoryDiT, StoryDiTConfig
from train.ema import EmaConfig
from train.optimizer import OptimizerConfig
from train.stage import StageConfig
from train.story_module import NonFiniteGradients, StoryModule

SIZES = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=192)


class FakeCodec:
    latent_channels, spatial_stride = 16, 4


@pytest.fixture
def module() -> StoryModule:
    return StoryModule(
        StoryDiT(StoryDiTConfig(**SIZES)),
        FakeCodec(),
        WordEncoder(),
        stage=StageConfig(name="s", caption="global", steps=1),
        optimizer=OptimizerConfig(lr=0.1, max_skipped=2),
        ema=EmaConfig(),
        sigma_shift=1.0,
        seed=0,
    )


def backward(module: StoryModule, factor: float) -> None:
    sum(parameter.sum() for parameter in module.dit.parameters()).mul(factor).backward()


def test_only_the_network_is_a_submodule(module):
    assert {name for name, _ in module.named_children()} == {"dit"}


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(module):
    optimizer = module.configure_optimizers()
    before = [parameter.detach().clone() for parameter in module.dit.parameters()]
    backward(module, float("nan"))
    module.configure_gradient_clipping(optimizer, None, None)
    optimizer.step()
    assert all(map(torch.equal, before, module.dit.parameters()))
    assert (module.num_skipped, module.skipped_in_a_row) == (1, 1)
    backward(module, 1.0)
    module.configure_gradient_clipping(optimizer, None, None)
    optimizer.step()
    assert (module.num_skipped, module.skipped_in_a_row) == (1, 0)
    assert not any(map(torch.equal, before, module.dit.parameters()))


def test_too_many_in_a_row_stop_the_run_and_name_the_clips(module):
    optimizer = module.configure_optimizers()
    module.batch_keys = ["clip-7", "clip-9"]
    for _ in range(2):
        backward(module, float("inf"))
        module.configure_gradient_clipping(optimizer, None, None)
    backward(module, float("inf"))
    with pytest.raises(NonFiniteGradients, match="clip-7, clip-9"):
        module.configure_gradient_clipping(optimizer, None, None)

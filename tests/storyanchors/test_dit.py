"""StoryDiT: packing, conditions, precision, saving and adapters; test_dit_wan.py compares it with Wan."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from storyanchors.conditioning import ClipConditions, stack_condition_channels
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.embedders import SCALAR_CONDITIONS

CONFIG = StoryDiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    ffn_dim=48,
    text_dim=12,
    latent_channels=3,
    freq_dim=32,
    frame_number_embedding=True,
)
KNOWN = ClipConditions(fps=24, frame_interval=69, motion=2.5, height=64, width=96, num_frames=4)
CLIPS = [  # frames, height, width, caption tokens, given frames, conditions, timestep
    (4, 4, 6, 5, [0], KNOWN, 731.25),
    (1, 8, 2, 1, [], ClipConditions(), 0.0),
    (3, 2, 2, 9, [0, 2], ClipConditions(motion=0.0), 1000.0),
    (6, 4, 4, 2, [1], ClipConditions(height=32, width=32), 12.5),
]


def make_dit(*, story_std: float, seed: int = 0) -> StoryDiT:
    """A network as after some training: what starts at zero is random too, new parts with story_std."""
    dit = StoryDiT(CONFIG).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            std = story_std if name.startswith("story_embedder.") else 0.2
            parameter.normal_(std=std, generator=generator)
    return dit


@pytest.fixture(scope="module")
def dit() -> StoryDiT:
    return make_dit(story_std=0.3)


def pack(clips: list[tuple] = CLIPS) -> tuple[list[Tensor], Tensor, list[ClipConditions], list[Tensor]]:
    """The arguments of forward."""
    inputs, captions = [], []
    for number, (F, H, W, L, given, *_) in enumerate(clips):
        generator = torch.Generator().manual_seed(number)
        noisy, cond = (torch.randn(F, 3, H, W, generator=generator) for _ in range(2))
        mask = torch.tensor([float(f in given) for f in range(F)])
        inputs.append(stack_condition_channels(noisy, cond, mask))
        captions.append(torch.randn(L, 12, generator=generator))
    return inputs, torch.tensor([clip[6] for clip in clips]), [clip[5] for clip in clips], captions


@torch.no_grad()
def velocities(dit: StoryDiT, inputs, timesteps, conditions, captions) -> list[Tensor]:
    return dit(inputs, timesteps, conditions, captions)


# Packing


def test_a_pack_of_clips_gives_what_each_gives_alone(dit):
    inputs, timesteps, conditions, captions = pack()
    together = velocities(dit, inputs, timesteps, conditions, captions)
    for i, velocity in enumerate(together):
        (alone,) = velocities(dit, inputs[i : i + 1], timesteps[i : i + 1], [conditions[i]], [captions[i]])
        assert velocity.shape == (inputs[i].shape[0], 3, *inputs[i].shape[2:])
        torch.testing.assert_close(velocity, alone, atol=1e-5, rtol=1e-5)


def test_the_order_of_a_pack_does_not_matter(dit):
    inputs, timesteps, conditions, captions = pack()
    forward = velocities(dit, inputs, timesteps, conditions, captions)
    backward = velocities(dit, inputs[::-1], timesteps.flip(0), conditions[::-1], captions[::-1])
    for one, other in zip(forward, reversed(backward), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_tensor_of_clips_gives_a_tensor(dit):
    inputs, timesteps, conditions, captions = pack([CLIPS[0]] * 3)
    listed = velocities(dit, inputs, timesteps, conditions, captions)
    stacked = velocities(dit, torch.stack(inputs), timesteps, conditions, captions)
    assert isinstance(stacked, Tensor) and torch.equal(stacked, torch.stack(listed))


def influence(dit: StoryDiT, *, of_frame: int, of_clip: int = 0) -> list[list[bool]]:
    """Which frames of which clips change when one frame's input does."""
    inputs, timesteps, conditions, captions = pack()
    before = velocities(dit, inputs, timesteps, conditions, captions)
    inputs[of_clip][of_frame, :3] += 1
    after = velocities(dit, inputs, timesteps, conditions, captions)
    changes = zip(before, after, strict=True)
    return [((a - b).abs().flatten(1).amax(1) > 1e-4).tolist() for a, b in changes]


@pytest.mark.parametrize("frame", [0, 2, 3])
def test_every_frame_sees_all_frames_of_its_clip_and_none_of_another(dit, frame):
    first, *others = influence(dit, of_frame=frame)
    assert all(first)  # later frames too
    assert not any(any(frames) for frames in others)


# What is new starts at nothing, and matters once it is trained


@pytest.mark.parametrize("frame_numbers", [True, False])
def test_at_first_neither_mask_nor_given_frames_nor_conditions_matter(frame_numbers):
    torch.manual_seed(0)
    dit = StoryDiT(dataclasses.replace(CONFIG, frame_number_embedding=frame_numbers)).eval()
    inputs, timesteps, conditions, captions = pack()
    plain = [torch.cat([clip[:, :3], torch.zeros_like(clip[:, 3:])], dim=1) for clip in inputs]
    told = velocities(dit, inputs, timesteps, conditions, captions)
    untold = velocities(dit, plain, timesteps, None, captions)
    for one, other in zip(told, untold, strict=True):
        assert one.abs().max() > 0.01 and torch.equal(one, other)  # difference exactly 0


CONDITIONS = {name: {name: 7} for name in SCALAR_CONDITIONS} | {"resolution": {"height": 7, "width": 9}}


def velocity_under(dit: StoryDiT, conditions: ClipConditions | None) -> Tensor:
    inputs, timesteps, _, captions = pack(CLIPS[:1])
    (velocity,) = velocities(dit, inputs, timesteps, conditions and [conditions], captions)
    return velocity


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_matters_and_unknown_is_not_zero(dit, name):
    unknown = velocity_under(dit, ClipConditions())
    known = velocity_under(dit, ClipConditions(**CONDITIONS[name]))
    other = velocity_under(
        dit, ClipConditions(**{key: value + 20 for key, value in CONDITIONS[name].items()})
    )
    nearly_zero = velocity_under(dit, ClipConditions(**dict.fromkeys(CONDITIONS[name], 1e-9)))
    for one, another in ((unknown, known), (known, other), (unknown, nearly_zero)):
        assert (one - another).abs().max() > 1e-3


def test_height_and_width_are_told_apart(dit):
    wide = velocity_under(dit, ClipConditions(height=64, width=96))
    assert (wide - velocity_under(dit, ClipConditions(height=96, width=64))).abs().max() > 1e-3


def test_no_conditions_are_unknown_conditions(dit):
    assert torch.equal(velocity_under(dit, None), velocity_under(dit, ClipConditions()))


def test_given_frames_and_the_mask_matter(dit):
    inputs, timesteps, conditions, captions = pack(CLIPS[:1])
    (before,) = velocities(dit, inputs, timesteps, conditions, captions)
    for channels in (slice(3, 6), slice(6, 7)):
        changed = inputs[0].clone()
        changed[0, channels] += 1
        (after,) = velocities(dit, [changed], timesteps, conditions, captions)
        assert (after - before).abs().flatten(1).amax(1).min() > 1e-4  # in every frame


def test_frame_numbers_tell_frames_apart_that_are_alike(dit):
    """Attention alone cannot: all tokens of two equal frames have the same value to give."""
    without = StoryDiT(dataclasses.replace(CONFIG, frame_number_embedding=False)).eval()
    without.load_state_dict(dit.state_dict(), strict=False)
    alike = ([torch.ones(2, 7, 4, 4)], torch.tensor([500.0]), None, [torch.ones(2, 12)])
    (numbered,), (unnumbered,) = velocities(dit, *alike), velocities(without, *alike)
    assert (numbered[0] - numbered[1]).abs().max() > 1e-3
    torch.testing.assert_close(unnumbered[0], unnumbered[1], atol=1e-5, rtol=1e-5)


def gradients(dit: StoryDiT) -> dict[str, Tensor]:
    inputs, timesteps, conditions, captions = pack()
    dit.zero_grad()
    torch.cat([v.flatten() for v in dit(inputs, timesteps, conditions, captions)]).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in dit.named_parameters()}


def test_every_new_part_learns_from_the_first_step():
    torch.manual_seed(0)
    grads = gradients(StoryDiT(CONFIG))
    assert grads["patch_embedding.weight"][:, 3:].flatten(2).any(2).all()  # condition and mask columns
    for name in (*CONDITIONS, "frame_number"):
        assert grads[f"story_embedder.{name}.linear_2.weight"].any()
        assert name == "frame_number" or grads[f"story_embedder.null.{name}"].any()


def test_every_parameter_has_a_gradient_whatever_is_known(dit):
    """Ranks whose clips know different conditions reduce the same gradients."""
    inputs, timesteps, _, captions = pack(CLIPS[:1])
    for conditions in (KNOWN, ClipConditions()):
        dit.zero_grad()
        dit(inputs, timesteps, [conditions], captions)[0].sum().backward()
        assert all(parameter.grad is not None for parameter in dit.parameters())
    dit.zero_grad()


# Precision, saving, adapters


def test_bfloat16_products_come_close_to_float32(dit):
    arguments = pack()
    with torch.autocast("cpu", torch.bfloat16):
        half = velocities(dit, *arguments)
    for one, other in zip(velocities(dit, *arguments), half, strict=True):
        assert float((one - other.float()).norm() / one.norm()) < 0.02


def test_bfloat16_weights_keep_their_float32_islands(dit, tmp_path):
    dit.save_pretrained(tmp_path)
    half = StoryDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    for name in ("condition_embedder.time_embedder.linear_1.weight", "blocks.1.scale_shift_table"):
        assert dtypes[name] == torch.float32
    assert all(d == torch.float32 for name, d in dtypes.items() if name.startswith("story_embedder."))
    for one, other in zip(velocities(dit, *pack()), velocities(half, *pack()), strict=True):
        assert float((one - other.float()).norm() / one.norm()) < 0.03


def test_nearby_timesteps_are_told_apart_under_bfloat16(dit):
    """Near 1000 bfloat16 has steps of 4: a timestep must stay float32."""
    inputs, _, conditions, captions = pack(CLIPS[:1])
    temb = dit.condition_embedder.time_embedder
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        one, other = temb(torch.tensor([998.0])), temb(torch.tensor([999.0]))
        dit(inputs, torch.tensor([998.0]), conditions, captions)
    assert one.dtype == torch.float32 and (one - other).abs().max() > 1e-3


def test_a_saved_network_comes_back_exactly(dit, tmp_path):
    dit.save_pretrained(tmp_path)
    loaded = StoryDiT.from_pretrained(tmp_path).eval()
    names = [field.name for field in dataclasses.fields(StoryDiTConfig)]
    assert StoryDiTConfig(**{name: loaded.config[name] for name in names}) == CONFIG
    assert loaded.state_dict().keys() == dit.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in dit.state_dict().items())
    for one, other in zip(velocities(dit, *pack()), velocities(loaded, *pack()), strict=True):
        assert torch.equal(one, other)


def test_a_network_to_be_filled_has_memory_for_every_weight_and_its_new_parts_at_their_start():
    dit = StoryDiT.unfilled(CONFIG, dtype=torch.bfloat16)
    assert dit.state_dict().keys() == StoryDiT(CONFIG).state_dict().keys()
    assert not any(parameter.is_meta for parameter in dit.parameters())
    assert dit.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    for embedder in (dit.story_embedder.fps, dit.story_embedder.resolution):
        assert embedder.linear_1.weight.dtype == torch.float32 and embedder.linear_1.weight.std() > 0.01
        assert not embedder.linear_2.weight.any() and not embedder.linear_1.bias.any()
    assert not dit.patch_embedding.weight[:, CONFIG.latent_channels :].any()


@pytest.mark.parametrize("mode", ["selective", "full", "auto"])
def test_checkpointed_activations_give_the_same_gradients(mode):
    plain, checkpointed = make_dit(story_std=0.3), make_dit(story_std=0.3)
    checkpointed.set_activation_checkpointing(mode)
    for (name, one), other in zip(gradients(plain).items(), gradients(checkpointed).values(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_compiled_block_gives_the_same_gradients_and_is_compiled_once_for_clips_of_other_lengths(mode):
    """Dynamo alone, without a code generator: what it must not do is break the graph or start again."""
    plain, compiled = make_dit(story_std=0.3), make_dit(story_std=0.3)
    compiled.set_activation_checkpointing(mode)
    graphs = CompileCounter()
    compiled.compile_blocks(backend=graphs)
    counts = []
    same, longer = CLIPS[3], (5, 4, 6, 9, [0], KNOWN, 731.25)
    for clips in ([same, same], [same, longer], [longer, CLIPS[0]]):
        for one, other in zip(
            velocities(plain, *pack(clips)), velocities(compiled, *pack(clips)), strict=True
        ):
            torch.testing.assert_close(one, other)
        counts.append(graphs.frame_count)
    for (name, one), other in zip(gradients(plain).items(), gradients(compiled).values(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    assert counts[0] == counts[1] == counts[2] > 0


def test_an_unknown_way_of_checkpointing_is_refused(dit):
    with pytest.raises(ValueError, match="activation_checkpointing is 'some', expected one of none, sel"):
        dit.set_activation_checkpointing("some")


def test_an_adapter_starts_at_nothing_learns_and_can_be_taken_off():
    dit = make_dit(story_std=0.3)
    arguments = pack()
    before = velocities(dit, *arguments)
    dit.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"]))
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 * 2 and all("lora_" in name for name in trained)  # A and B
    assert all(torch.equal(a, b) for a, b in zip(before, velocities(dit, *arguments), strict=True))
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.2)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, velocities(dit, *arguments), strict=True))
    dit.disable_adapters()
    assert all(torch.equal(a, b) for a, b in zip(before, velocities(dit, *arguments), strict=True))


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"captions": a["captions"][:3]}, "'conditions': 4, 'captions': 3"),
        (lambda a: a | {"timesteps": a["timesteps"][:1]}, "found {'inputs': 4, 'timesteps': 1"),
        (lambda a: a | {"conditions": [KNOWN]}, "'conditions': 1"),
        (
            lambda a: a | {"inputs": [clip[:, :3] for clip in a["inputs"]]},
            r"must be (F, 7, H, W) with 7 = 2 x 3 + 1 channels, found (4, 3, 4, 6)",
        ),
        (lambda a: a | {"inputs": [clip[0] for clip in a["inputs"]]}, "found (7, 4, 6)"),
        (lambda a: a | {"captions": [c[:, :9] for c in a["captions"]]}, "(L, 12) with L > 0, found (5, 9)"),
        (lambda a: a | {"captions": [c[:0] for c in a["captions"]]}, "found (0, 12)"),
        (lambda a: a | {"inputs": [c[:, :, 1:] for c in a["inputs"]]}, "latents of 3x6 do not divide"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_say_what_was_found(dit, change, message):
    arguments = dict(zip(("inputs", "timesteps", "conditions", "captions"), pack(), strict=True))
    with pytest.raises(ValueError) as error:
        dit(**change(arguments))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StoryDiTConfig.preset("wan-2b"), "unknown preset 'wan-2b', expected one of tiny, wan-1.3b"),
        (lambda: dataclasses.replace(CONFIG, patch_size=(2, 2, 2)), r"never merged, found (2, 2, 2)"),
        (lambda: dataclasses.replace(CONFIG, attention_head_dim=9), "even and at least 12, found 9"),
        (lambda: StoryDiT.from_config({**vars(CONFIG), "image_dim": 1280}), "unknown keys ['image_dim']"),
        (
            lambda: dataclasses.replace(CONFIG, qk_norm="layer_norm"),
            "qk_norm is 'layer_norm', expected rms_norm_ac",
        ),
        (lambda: dataclasses.replace(CONFIG, rope_axes_dim=(4, 4, 5)), r"found (4, 4, 5)"),
    ],
)
def test_an_impossible_network_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_the_tiny_preset_is_small_and_has_the_papers_33_input_channels():
    with torch.device("meta"):
        tiny = StoryDiT(StoryDiTConfig.preset("tiny"))
    assert tiny.patch_embedding.in_channels == 33
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 10_000_000

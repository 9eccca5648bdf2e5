"""A LoRA begins as the base model, survives every trip to disk and back, and says so when it cannot."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from storyanchors.conditioning import ClipConditions
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.lora import (
    LORA_FILE,
    LoraSettings,
    add_lora,
    cast_base,
    has_lora,
    load_lora,
    merge_lora,
    save_lora,
)
from storyanchors.weights import load_story_dit

SETTINGS = LoraSettings(rank=4, alpha=10)  # alpha is not rank: a lost alpha changes the output
CLIPS = [torch.randn(F, 9, 4, W, generator=torch.Generator().manual_seed(F)) for F, W in ((3, 6), (1, 4))]
CAPTIONS = [torch.randn(L, 24, generator=torch.Generator().manual_seed(L)) for L in (5, 2)]


STEP_VIDEO = dict(
    norm_affine=True, cross_attn_norm=False, qk_norm="rms_norm", linear_bias=False, rope_axes_dim=(16, 8, 8),
    text_norm=True, reversed_flow=True,
)  # fmt: skip


@pytest.fixture(params=["wan", "step-video"])
def base(config: StoryDiTConfig, request) -> StoryDiT:
    dit = StoryDiT(replace(config, **STEP_VIDEO) if request.param == "step-video" else config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return dit


@pytest.fixture
def adapted(base: StoryDiT) -> StoryDiT:
    """The base with an adapter that has learned something everywhere."""
    dit = copy.deepcopy(base)
    add_lora(dit, SETTINGS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return dit


def velocity(dit: StoryDiT) -> Tensor:
    conditions = [ClipConditions(fps=24, motion=2.0), ClipConditions(height=64, width=96)]
    parts = dit(CLIPS, torch.tensor([500.0, 20.5]), conditions, CAPTIONS)
    return torch.cat([part.flatten() for part in parts])


def difference(one: StoryDiT, other: StoryDiT) -> float:
    with torch.no_grad():
        return float((velocity(one) - velocity(other)).abs().max())


def trained(dit: StoryDiT) -> set[str]:
    return {name for name, parameter in dit.named_parameters() if parameter.requires_grad}


def test_it_begins_as_the_base_model(base):
    dit = copy.deepcopy(base)
    add_lora(dit, SETTINGS)
    assert difference(dit, base) == 0


def test_low_rank_in_every_block_and_the_new_parts_whole(base, adapted):
    weights = [name for name in base.state_dict() if name.startswith("blocks.") and name.endswith(".weight")]
    matrices = [name.removesuffix(".weight") for name in weights if ".to_" in name or ".ffn." in name]
    low_rank = {f"{matrix}.lora_{factor}.default.weight" for matrix in matrices for factor in "AB"}
    whole = {
        f"{part}.modules_to_save.default.{name}"
        for part in ("patch_embedding", "story_embedder")
        for name, _ in getattr(base, part).named_parameters()
    }
    assert len(low_rank) == 3 * 10 * 2  # blocks, matrices of a block, factors
    assert trained(adapted) == low_rank | whole


def test_every_part_of_it_acts_on_the_output(adapted):
    """Also a network that reads a weight without calling its module would fail here."""
    velocity(adapted).square().sum().backward()
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif name.startswith("story_embedder"):
            assert parameter.grad is not None, name  # zero where the clips' conditions do not reach it
        else:
            assert parameter.grad.abs().max() > 0, name


def test_the_first_factors_are_drawn_from_the_seed(base):
    first, again, other = (copy.deepcopy(base) for _ in range(3))
    for dit, seed in ((first, 3), (again, 3), (other, 4)):
        torch.manual_seed(seed + 100 * (dit is again))
        add_lora(dit, SETTINGS, seed=seed)
    name = "blocks.0.attn1.to_q.lora_A.default.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_saved_and_loaded_it_is_the_same(base, adapted, tmp_path):
    save_lora(adapted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    dit = copy.deepcopy(base)
    assert load_lora(dit, tmp_path) == SETTINGS
    assert difference(dit, adapted) == 0 < difference(dit, base)
    assert trained(dit) == trained(adapted)


def test_the_file_may_have_another_name(base, adapted, tmp_path):
    save_lora(adapted, tmp_path)
    (tmp_path / LORA_FILE).rename(tmp_path / "watercolour.safetensors")
    dit = copy.deepcopy(base)
    load_lora(dit, tmp_path / "watercolour.safetensors")
    assert difference(dit, adapted) == 0
    with pytest.raises(ValueError, match=r"found no LoRA at .*/nowhere"):
        load_lora(copy.deepcopy(base), tmp_path / "nowhere")


def test_the_same_adapter_is_the_same_file(adapted, tmp_path):
    for name in "ab":
        save_lora(adapted, tmp_path / name)
    assert (tmp_path / "a" / LORA_FILE).read_bytes() == (tmp_path / "b" / LORA_FILE).read_bytes()


def test_merged_it_is_a_plain_network_of_the_same_output(base, adapted):
    dit = copy.deepcopy(adapted)
    merge_lora(dit)
    assert list(dit.state_dict()) == list(base.state_dict())
    assert trained(dit) == trained(base) and not has_lora(dit)
    assert difference(dit, adapted) <= 1e-5 < difference(dit, base)


def test_in_bfloat16_it_computes_what_it_was_trained_to_in_float32(base, adapted, tmp_path):
    """The base as inference loads it; the file is float32."""
    base.save_pretrained(tmp_path / "base")
    save_lora(adapted, tmp_path / "lora")
    half = load_story_dit(tmp_path / "base", dtype=torch.bfloat16)
    before = velocity(half)
    load_lora(half, tmp_path / "lora")
    expected = velocity(adapted)
    assert (velocity(half) - expected).norm() < 0.05 * expected.norm() < 0.5 * (before - expected).norm()
    merge_lora(half)
    assert (velocity(half) - expected).norm() < 0.05 * expected.norm()


def test_a_base_in_bfloat16_trains_the_same_bits_under_autocast(adapted):
    def step(dit: StoryDiT) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            velocity(dit).square().mean().backward()
        return {name: p.grad for name, p in dit.named_parameters() if p.requires_grad}

    dit = copy.deepcopy(adapted)
    cast_base(dit, torch.bfloat16)
    assert dit.blocks[0].ffn.net[2].base_layer.weight.dtype == torch.bfloat16
    found, expected = step(dit), step(adapted)
    assert found.keys() == expected.keys() and len(found) > 60
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_merged_network_is_saved_and_adapted_like_any_other(adapted, tmp_path):
    merge_lora(adapted)
    adapted.save_pretrained(tmp_path)
    again = StoryDiT.from_pretrained(tmp_path)
    assert difference(again, adapted) == 0
    add_lora(again, SETTINGS)
    assert difference(again, adapted) == 0


def test_a_second_one_is_refused(adapted, tmp_path):
    save_lora(adapted, tmp_path)
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(adapted, SETTINGS)
    with pytest.raises(ValueError, match="has a LoRA already"):
        load_lora(adapted, tmp_path)


def no_settings(file: Path) -> None:
    save_file(load_file(file), file, metadata={"format": "pt"})


def without(part: str):
    def damage(file: Path) -> None:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
        save_file({name: t for name, t in load_file(file).items() if part not in name}, file, metadata)

    return damage


def other_rank(file: Path) -> None:
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"]) | {"r": 8}
    save_file(load_file(file), file, metadata | {"lora_adapter_metadata": json.dumps(settings)})


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "found no LoRA at .*pytorch_lora_weights.safetensors"),
        (no_settings, "does not say its rank and alpha"),
        (without("blocks.1.attn2.to_k.lora_B"), r"lacks blocks\.1\.attn2\.to_k\.lora_B\.weight"),
        (without("story_embedder"), "lacks story_embedder.* more"),
        (other_rank, r"shape \(4, \d+\), the network expects \(8, \d+\)"),
        (cut_off, "not a complete safetensors file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(base, adapted, tmp_path, damage, message):
    save_lora(adapted, tmp_path)
    damage(tmp_path / LORA_FILE)
    dit = copy.deepcopy(base)
    with pytest.raises(ValueError, match=message):
        load_lora(dit, tmp_path)
    assert not has_lora(dit) and dit.state_dict().keys() == base.state_dict().keys()
    assert difference(dit, base) == 0


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 4, "alpha": 0.0}, {"rank": 4, "alpha": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        LoraSettings(**settings)

from itertools import pairwise

import pytest
import torch

from storyanchors.dit import StoryDiT, StoryDiTConfig
from train.optimizer import OptimizerConfig, build_optimizer, lr_share, parameter_groups, set_learning_rates

SIZES = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=32, text_dim=8)


def groups_by_name(config: OptimizerConfig) -> dict[str, dict]:
    dit = StoryDiT(StoryDiTConfig(**SIZES))
    groups = parameter_groups(dit, config, lr_scale=1.0)
    owners = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(owners) == sum(len(group["params"]) for group in groups), "a parameter in two groups"
    return {name: owners[id(parameter)] for name, parameter in dit.named_parameters()}


def test_every_parameter_is_in_one_group_and_tables_do_not_decay():
    groups = groups_by_name(OptimizerConfig(lr=1.0, weight_decay=0.1))
    decays = {name for name, group in groups.items() if group["weight_decay"]}
    assert decays == {name for name in groups if name.endswith(".weight") and "norm" not in name}, (
        "matrices, and nothing else"
    )


def test_new_parts_have_their_own_rate():
    groups = groups_by_name(OptimizerConfig(lr=1.0, new_parts_lr=5.0))
    new = {name for name in groups if name.startswith("story_embedder.")}
    assert {name for name, group in groups.items() if group["peak_lr"] == 5.0} == new
    assert {name for name, group in groups.items() if group["name"] == "new_parts"} == new


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_the_rate_warms_up_peaks_and_ends_low(schedule):
    config = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=schedule, final_lr_scale=0.1)
    shares = [lr_share(step, 100, config) for step in range(101)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == shares[10] == 1.0
    assert shares[100] == pytest.approx(0.1)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares[10:]))
    if schedule == "trapezoid":
        assert shares[80] == 1.0 and shares[90] == pytest.approx(0.55)


def test_rates_are_set_from_the_peaks():
    weight = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(weight, OptimizerConfig(lr=2.0), lr_scale=0.5)
    set_learning_rates(optimizer, 0.25)
    set_learning_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", float("nan")), ("lr", -1e-4), ("new_parts_lr", float("inf")), ("beta2", 1.0),
        ("warmup_steps", -1), ("decay_share", 1.5), ("clip_norm", 0.0), ("clip_norm", float("nan")),
    ],
)  # fmt: skip
def test_a_number_that_would_spoil_the_weights_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"optimizer.{name} is "):
        OptimizerConfig(**{"lr": 1e-4, name: value})


def test_bounds_themselves_are_taken():
    OptimizerConfig(lr=0.0, weight_decay=0.0, decay_share=1.0, warmup_steps=0, max_skipped=0)

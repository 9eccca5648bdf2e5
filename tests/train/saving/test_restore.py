"""The global generators go on where they were."""

import random

import numpy as np
import torch

from train.saving.restore import rng_state, seed_rng, set_rng_state


def draws() -> list[float]:
    return [
        random.gauss(),
        np.random.standard_normal(),
        torch.randn(1).item(),
        np.random.rand(),
        random.random(),
    ]


def test_generators_that_are_restored_draw_the_same_again():
    random.gauss(), np.random.standard_normal()  # each keeps a second number for the next call
    state = rng_state()
    expected = draws()
    assert draws() != expected
    set_rng_state(state)
    assert draws() == expected


def test_a_seed_decides_every_generator():
    seed_rng(7)
    expected = draws()
    seed_rng(7)
    assert draws() == expected
    seed_rng(8)
    assert draws() != expected

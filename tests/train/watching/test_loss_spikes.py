import random

from train.watching.loss_spikes import LossSpikes


def test_a_clip_far_above_the_running_mean_is_a_spike_and_its_neighbours_are_not():
    draw, spikes = random.Random(0), LossSpikes()
    losses = [draw.lognormvariate(-1, 0.6) for _ in range(20_000)]  # as noise levels scatter them
    assert not list(spikes.found([""] * len(losses), losses))
    [line] = spikes.found(["a", "b", "c"], [0.4, 40.0, 0.3])
    assert line.startswith("clip b has 40, the running mean is 0.")
    [line] = spikes.found(["d", "e"], [float("nan"), 0.4])
    assert line.startswith("clip d has nan")


def test_a_young_run_has_no_spikes():
    assert not list(LossSpikes().found(["a", "b", "c"], [0.1, 0.1, 90.0]))

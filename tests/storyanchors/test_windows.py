"""Windows draw every frame once, from what is known, and see as much of it as they can."""

import random
from math import ceil

import pytest

from storyanchors.windows import Window, plan_windows


def random_cases(count: int = 300) -> list[tuple[int, set[int], int, int]]:
    """(num_frames, known, window, overlap): known frames here and there, or all but some gaps."""
    cases = [
        (size + 1, {1, size + 1}, size, 1) for size in range(3, 11)
    ]  # where a full window would be blind
    for seed in range(count):
        chance = random.Random(seed)
        num_frames, size = chance.randint(1, 30), chance.randint(3, 10)
        share = chance.choice([0, 0.1, 0.5, 0.9])
        known = {number for number in range(1, num_frames + 1) if chance.random() < share}
        if seed % 2:
            gaps = [
                sorted(chance.choices(range(1, num_frames + 1), k=2)) for _ in range(chance.randint(1, 2))
            ]
            known = {n for n in range(1, num_frames + 1) if not any(a <= n <= b for a, b in gaps)}
        cases.append((num_frames, known, size, chance.randint(1, size - 1)))
    return cases


def steps():
    """Every window of every case with what was known before it: (window, seen, num_frames, size, overlap)."""
    for num_frames, known, size, overlap in random_cases():
        seen = set(known)
        for window in plan_windows(num_frames, known, window=size, overlap=overlap):
            yield window, frozenset(seen), num_frames, min(size, num_frames), overlap
            seen |= set(window.drawn)


def is_blind(first: int, last: int, seen: frozenset[int]) -> bool:
    """Whether a window would draw a frame at its edge with a known one just outside."""
    return any(
        edge not in seen and outside in seen for edge, outside in ((first, first - 1), (last, last + 1))
    )


def placements(seen: frozenset[int], num_frames: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(given, drawn) of each place where a window of this size would have something to draw."""
    places = [range(first, first + size) for first in range(1, num_frames - size + 2)]
    parted = [
        ([n for n in place if n in seen], [n for n in place if n not in seen])
        for place in places
        if not is_blind(place[0], place[-1], seen)
    ]
    return [(given, drawn) for given, drawn in parted if drawn]


def sees_both_sides(given, drawn) -> bool:
    return bool(given) and given[0] < drawn[0] and given[-1] > drawn[-1]


def test_every_unknown_frame_is_drawn_exactly_once():
    for num_frames, known, size, overlap in random_cases():
        plan = plan_windows(num_frames, known, window=size, overlap=overlap)
        drawn = [number for window in plan for number in window.drawn]
        assert sorted(drawn) == sorted(set(range(1, num_frames + 1)) - known)


def test_a_window_draws_all_it_does_not_know_and_sees_all_it_knows():
    for window, seen, *_ in steps():
        numbers = range(window.first, window.last + 1)
        assert window.given == tuple(number for number in numbers if number in seen)
        assert window.drawn == tuple(number for number in numbers if number not in seen)
        assert window.drawn


def test_the_plan_of_a_story_that_was_stopped_is_the_rest_of_its_plan():
    for num_frames, known, size, overlap in random_cases():
        plan = plan_windows(num_frames, known, window=size, overlap=overlap)
        for done, window in enumerate(plan, start=1):
            known = known | set(window.drawn)
            assert plan_windows(num_frames, known, window=size, overlap=overlap) == plan[done:]


def test_no_frame_is_drawn_beside_a_known_one_that_is_not_seen():
    for window, seen, *_ in steps():
        assert not is_blind(window.first, window.last, seen)


def test_a_window_is_as_long_as_it_can_be():
    shorter = 0
    for window, seen, num_frames, size, _ in steps():
        length = window.last - window.first + 1
        assert length <= size and 1 <= window.first and window.last <= num_frames
        assert not any(placements(seen, num_frames, longer) for longer in range(length + 1, size + 1))
        shorter += length < size
    assert shorter == 8


def test_windows_share_frames_wherever_there_are_known_ones():
    for window, seen, num_frames, _, overlap in steps():
        length = window.last - window.first + 1
        most = max(len(given) for given, _ in placements(seen, num_frames, length))
        assert len(window.given) >= min(overlap, most)
        assert window.given or not seen


def test_a_window_that_can_see_both_sides_of_what_it_draws_does():
    seen_both = 0
    for window, seen, num_frames, _, overlap in steps():
        fitting = placements(seen, num_frames, window.last - window.first + 1)
        shared = min(overlap, max(len(given) for given, _ in fitting))
        if any(sees_both_sides(given, drawn) for given, drawn in fitting if len(given) >= shared):
            assert sees_both_sides(window.given, window.drawn)
            seen_both += 1
    assert seen_both > 100


def test_a_window_draws_as_many_as_any_that_sees_as_much():
    def sight(given, drawn, overlap):
        before = bool(given) and given[0] < drawn[0]
        return min(len(given), overlap), sees_both_sides(given, drawn), before

    for window, seen, num_frames, _, overlap in steps():
        for given, drawn in placements(seen, num_frames, window.last - window.first + 1):
            if sight(given, drawn, overlap) == sight(window.given, window.drawn, overlap):
                assert len(drawn) <= len(window.drawn)


@pytest.mark.parametrize("overlap", [1, 2, 4, 7])
@pytest.mark.parametrize("num_frames", [9, 12, 20, 24])
def test_a_story_grows_by_as_many_frames_as_do_not_overlap(num_frames, overlap):
    right = plan_windows(num_frames, range(1, 9), window=8, overlap=overlap)
    assert len(right) == ceil((num_frames - 8) / (8 - overlap))
    mirrored = [tuple(num_frames + 1 - number for number in reversed(window.drawn)) for window in right]
    left = plan_windows(num_frames, range(num_frames - 7, num_frames + 1), window=8, overlap=overlap)
    assert [window.drawn for window in left] == mirrored
    assert [window.drawn for window in plan_windows(num_frames, [], window=8, overlap=overlap)] == [
        tuple(range(1, 9)),
        *(window.drawn for window in right),
    ]


def test_a_story_that_the_model_draws_at_once_is_one_window():
    assert plan_windows(8, [2], window=8, overlap=4) == [Window(1, 8, (2,), (1, 3, 4, 5, 6, 7, 8))]
    assert plan_windows(3, [], window=8, overlap=4) == [Window(1, 3, (), (1, 2, 3))]


def test_nothing_unknown_is_no_window():
    assert plan_windows(20, range(1, 21), window=8, overlap=4) == []


def test_a_story_grows_to_the_right_then_to_the_left():
    plan = plan_windows(20, range(7, 15), window=8, overlap=4)
    assert [window.drawn for window in plan] == [(15, 16, 17, 18), (19, 20), (3, 4, 5, 6), (1, 2)]


def test_the_last_window_of_a_gap_sees_both_of_its_ends():
    for num_frames in range(4, 40):
        *_, last = plan_windows(num_frames, [1, num_frames], window=8, overlap=3)
        assert sees_both_sides(last.given, last.drawn) and last.given[-1] == num_frames


def test_a_single_frame_is_drawn_from_the_middle_of_its_neighbours():
    [window] = plan_windows(20, set(range(1, 21)) - {10}, window=7, overlap=2)
    assert (window.first, window.last) == (7, 13)


@pytest.mark.parametrize(
    ("size", "overlap", "message"),
    [
        (8, 8, "overlap is 8, expected 1 to 7 for windows of 8 frames"),
        (8, 0, "overlap is 0, expected 1 to 7 for windows of 8 frames"),
        (2, 1, "a window of 2 cannot show both sides of a frame, expected 3 frames or more"),
        (8, -1, "overlap is -1, expected 1 to 7"),
    ],
)
def test_a_window_too_small_for_its_overlap_is_refused(size, overlap, message):
    with pytest.raises(ValueError) as error:
        plan_windows(20, [1], window=size, overlap=overlap)
    assert message in str(error.value)


def test_known_frames_outside_the_story_are_named():
    with pytest.raises(ValueError, match=r"known frames \[0, 21\] are outside the story's 1 to 20"):
        plan_windows(20, [0, 3, 21], window=8, overlap=4)
    with pytest.raises(ValueError, match="a story has at least one frame, found 0"):
        plan_windows(0, [], window=8, overlap=4)

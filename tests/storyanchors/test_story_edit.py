"""The algebra of story edits, on random stories whose events overlap, repeat and stand in any order."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from storyanchors.story import Event, Story
from storyanchors.story_edit import (
    StoryEdit,
    delete_frames,
    edit_frames,
    extend_left,
    extend_right,
    insert_event,
    keep_frames,
    redraw_frames,
    replace_story,
    window,
)
from storyanchors.windows import plan_windows

DOCS = Path(__file__).parents[2] / "docs" / "editing.md"
WORDS = "abcd"  # few, so that texts meet again


def random_story(chance: random.Random) -> Story:
    events, covered = [], 0
    while covered < 9 and (not events or chance.random() < 0.8):
        first = chance.randint(1, covered + 1)
        events.append(Event(first, first + chance.choice([0, 0, 1, 3]), chance.choice(WORDS)))
        covered = max(covered, events[-1].last_frame)
    chance.shuffle(events)
    return Story(list(dict.fromkeys(events)), ["the king"], "ink", "all of it")


def random_events(chance: random.Random) -> list[tuple[str, int]]:
    return [(chance.choice(WORDS), chance.randint(1, 3)) for _ in range(chance.randint(1, 3))]


def some_frames(chance: random.Random, story: Story, most: int) -> list[int]:
    return chance.sample(range(1, story.num_frames + 1), k=chance.randint(1, most))


def random_edit(chance: random.Random, story: Story) -> StoryEdit:
    """An edit of any kind that leaves the texts of kept frames alone."""
    count = story.num_frames
    edits = [
        lambda: keep_frames(story, some_frames(chance, story, count)),
        lambda: redraw_frames(story, some_frames(chance, story, count)),
        lambda: edit_frames(story, {n: chance.choice(WORDS) for n in some_frames(chance, story, count)}),
        lambda: insert_event(story, chance.randint(0, count), chance.choice(WORDS), chance.randint(1, 3)),
        lambda: extend_left(story, random_events(chance)),
        lambda: extend_right(story, random_events(chance)),
    ]
    if count > 1:
        edits.append(lambda: delete_frames(story, some_frames(chance, story, count - 1)))
    return chance.choice(edits)()


def told(story: Story) -> list[set[str]]:
    """What is told of each frame, from the definition of an event."""
    return [
        {event.description for event in story.events if event.first_frame <= number <= event.last_frame}
        for number in range(1, story.num_frames + 1)
    ]


def in_reading_order(story: Story) -> Story:
    """The same texts of the same frames, as every edit that changes a text writes them down."""
    return Story.from_descriptions(story.descriptions(), story.subjects, story.style)


def everything(story: Story) -> dict[int, int]:
    return {number: number for number in range(1, story.num_frames + 1)}


def all_but(story: Story, numbers) -> dict[int, int]:
    return {number: number for number in everything(story) if number not in numbers}


CASES = [(random.Random(seed), random_story(random.Random(seed))) for seed in range(300)]


def test_the_random_stories_have_what_makes_edits_hard():
    pairs = [(a, b) for _, story in CASES for a in story.events for b in story.events if a != b]
    assert any(a.description == b.description and a.last_frame + 1 == b.first_frame for a, b in pairs)
    assert any(
        a.description == b.description and a.first_frame < b.first_frame <= a.last_frame for a, b in pairs
    )
    assert any(
        a.description != b.description and a.first_frame < b.first_frame <= a.last_frame for a, b in pairs
    )
    assert any(story.num_frames == 1 for _, story in CASES)


def test_kept_frames_keep_their_texts_their_order_and_nothing_else_is_drawn():
    for chance, story in CASES:
        edit = random_edit(chance, story)
        for after, before in edit.kept.items():
            assert told(edit.story)[after - 1] == told(story)[before - 1]
        assert list(edit.kept.values()) == sorted(set(edit.kept.values())) and list(edit.kept) == sorted(
            edit.kept
        )
        assert sorted([*edit.kept, *edit.drawn()]) == list(range(1, edit.story.num_frames + 1))
        assert (edit.story.subjects, edit.story.style) == (["the king"], "ink")


def test_a_story_keeps_its_global_caption_exactly_while_its_texts_are_the_same():
    for chance, story in CASES:
        edit = random_edit(chance, story)
        assert edit.story == story if told(edit.story) == told(story) else edit.story.global_caption == ""


def test_changed_stories_stand_in_reading_order_and_a_text_that_goes_on_is_one_event():
    for chance, story in CASES:
        edited = random_edit(chance, story).story
        if edited == story:
            continue
        firsts = [event.first_frame for event in edited.events]
        assert firsts == sorted(firsts)
        for event in edited.events:
            for other in edited.events:
                apart = other.last_frame + 1 < event.first_frame or event.last_frame + 1 < other.first_frame
                assert event == other or event.description != other.description or apart


def test_events_that_begin_together_keep_their_order():
    story = Story([Event(3, 3, "z"), *(Event(1, 3, text) for text in "gfedcba"), Event(1, 2, "m")])
    inserted = insert_event(story, 1, "new").story.events
    assert [(event.first_frame, event.last_frame, event.description) for event in inserted] == [
        *((1, 1, text) for text in "gfedcbam"),
        (2, 2, "new"),
        *((3, 4, text) for text in "gfedcba"),
        (3, 3, "m"),
        (4, 4, "z"),
    ]


def test_texts_per_frame_and_events_say_the_same():
    for _, story in CASES:
        assert [set(texts) for texts in story.descriptions()] == told(story)
        assert all(len(texts) == len(set(texts)) for texts in story.descriptions())
        assert told(in_reading_order(story)) == told(story)
        assert in_reading_order(in_reading_order(story)) == in_reading_order(story)


def test_deleting_what_was_inserted_gives_the_story_back():
    for chance, story in CASES:
        after, count = chance.randint(0, story.num_frames), chance.randint(1, 3)
        inserted = insert_event(story, after, "a text of its own", count)
        deleted = delete_frames(inserted.story, range(after + 1, after + count + 1))
        assert deleted.story == in_reading_order(story)
        assert inserted.then(deleted).kept == everything(story) and deleted.drawn() == []
        assert inserted.drawn() == list(range(after + 1, after + count + 1))


def test_deleting_an_inserted_text_that_is_told_beside_it_gives_the_events_back():
    for chance, story in CASES:  # events that begin together may have changed places
        after = chance.randint(0, story.num_frames)
        inserted = insert_event(story, after, chance.choice(WORDS))
        deleted = delete_frames(inserted.story, [after + 1]).story
        assert set(deleted.events) == set(in_reading_order(story).events)


def test_inserting_at_an_end_is_extending():
    for chance, story in CASES:
        text, count = chance.choice(WORDS), chance.randint(1, 3)
        assert insert_event(story, 0, text, count) == extend_left(story, [(text, count)])
        assert insert_event(story, story.num_frames, text, count) == extend_right(story, [(text, count)])


def test_extending_adds_the_events_in_reading_order():
    for chance, story in CASES:
        events = random_events(chance)
        new = [{text} for text, count in events for _ in range(count)]
        assert told(extend_right(story, events).story) == told(story) + new
        left = extend_left(story, events)
        assert told(left.story) == new + told(story)
        assert left.kept == {number + len(new): number for number in everything(story)}


def test_extending_twice_is_extending_once():
    for chance, story in CASES:
        first, second = random_events(chance), random_events(chance)
        right = extend_right(story, first)
        both = right.then(extend_right(right.story, second))
        once = extend_right(story, first + second)
        assert (both.story, both.kept) == (once.story, once.kept)


def test_an_edit_locks_all_other_frames_and_tells_its_frames_the_new_text_alone():
    for chance, story in CASES:
        new = {number: chance.choice(WORDS) for number in some_frames(chance, story, story.num_frames)}
        edit = edit_frames(story, new)
        assert edit.kept == all_but(story, new) and edit.drawn() == sorted(new)
        texts = told(story)
        for number, text in new.items():
            texts[number - 1] = {text}
        assert told(edit.story) == texts


def test_frames_edited_one_after_another_or_at_once_are_one_edit():
    for chance, story in CASES:
        new = {number: chance.choice(WORDS) for number in some_frames(chance, story, story.num_frames)}
        edit = keep_frames(story, everything(story))
        for number, text in new.items():
            edit = edit.then(edit_frames(edit.story, {number: text}))
        once = edit_frames(story, new)
        assert edit.kept == once.kept and told(edit.story) == told(once.story)


def test_neighbours_with_one_new_text_become_one_event():
    story = Story([Event(1, 3, "a"), Event(4, 6, "b")])
    assert edit_frames(story, {3: "new", 4: " new\n"}).story.events == [
        Event(1, 2, "a"),
        Event(3, 4, "new"),
        Event(5, 6, "b"),
    ]


def test_editing_a_text_back_gives_the_story_back():
    for chance, story in CASES:
        number = chance.randint(1, story.num_frames)
        [*texts] = told(story)[number - 1]
        if len(texts) == 1:
            there = edit_frames(story, {number: "a text of its own"})
            assert edit_frames(there.story, {number: texts[0]}).story == in_reading_order(story)


def test_frames_deleted_one_after_another_or_at_once_are_one_deletion():
    for chance, story in CASES:
        if story.num_frames == 1:
            continue
        numbers = some_frames(chance, story, story.num_frames - 1)
        edit = keep_frames(story, everything(story))
        for number in sorted(numbers, reverse=True):
            edit = edit.then(delete_frames(edit.story, [number]))
        once = delete_frames(story, numbers)
        assert (told(edit.story), edit.kept) == (told(once.story), once.kept)
        rest = sorted(set(everything(story)) - set(numbers))
        assert told(once.story) == [told(story)[number - 1] for number in rest]
        assert list(once.kept.values()) == rest and once.drawn() == []


def test_keeping_and_redrawing_are_the_two_sides_of_one_mask():
    for chance, story in CASES:
        numbers = some_frames(chance, story, story.num_frames)
        redrawn = redraw_frames(story, numbers)
        assert redrawn.kept == keep_frames(story, set(everything(story)) - set(numbers)).kept
        assert redrawn.kept == all_but(story, numbers) and redrawn.story == story
    assert keep_frames(story, []).drawn() == list(everything(story))


def test_another_story_is_drawn_around_frames_that_keep_their_numbers():
    for chance, story in CASES:
        other = random_story(chance)
        numbers = range(1, chance.randint(0, min(story.num_frames, other.num_frames)) + 1)
        edit = replace_story(story, other, numbers)
        assert edit.story == other and edit.kept == {number: number for number in numbers}


def test_edits_in_a_row_are_one_edit_however_they_are_taken_together():
    for chance, story in CASES:
        one = random_edit(chance, story)
        two = random_edit(chance, one.story)
        three = random_edit(chance, two.story)
        assert one.then(two).then(three) == one.then(two.then(three))


def test_doing_nothing_before_or_after_an_edit_changes_nothing():
    for chance, story in CASES:
        edit = random_edit(chance, story)
        nothing = keep_frames(story, everything(story)), keep_frames(edit.story, everything(edit.story))
        for both in (nothing[0].then(edit), edit.then(nothing[1])):
            assert (both.story, both.kept) == (edit.story, edit.kept)


def test_two_edits_taken_together_do_to_pictures_what_they_do_one_by_one():
    def draw(edit, pictures):
        return [
            pictures[edit.kept[n] - 1] if n in edit.kept else "new"
            for n in range(1, edit.story.num_frames + 1)
        ]

    for chance, story in CASES:
        one = random_edit(chance, story)
        two = random_edit(chance, one.story)
        pictures = [f"picture {number}" for number in everything(story)]
        assert draw(one.then(two), pictures) == draw(two, draw(one, pictures))


def test_a_window_of_the_whole_story_is_the_story():
    for _, story in CASES:
        assert window(story, 1, story.num_frames) == story


def test_a_window_is_what_is_left_when_all_other_frames_are_deleted():
    for chance, story in CASES:
        first, last = sorted(chance.choices(list(everything(story)), k=2))
        part = window(story, first, last)
        assert told(part) == told(story)[first - 1 : last] and part.subjects == story.subjects
        if others := set(everything(story)) - set(range(first, last + 1)):
            assert part == delete_frames(story, others).story


def test_a_window_of_a_window_is_a_window():
    for chance, story in CASES:
        first, last = sorted(chance.choices(list(everything(story)), k=2))
        part = window(story, first, last)
        inner = sorted(chance.choices(list(everything(part)), k=2))
        assert told(window(part, *inner)) == told(window(story, *(first - 1 + number for number in inner)))


def test_every_edit_says_in_one_line_what_it_is():
    story = Story([Event(1, 8, "a")])
    assert [edit.what for edit in (
        keep_frames(story, [1, 2, 3, 7]),
        keep_frames(story, range(1, 9)),
        keep_frames(story, []),
        redraw_frames(story, (5, 2, 4)),
        edit_frames(story, {4: "the king\nleaves", 2: "he waits"}),
        insert_event(story, 3, "the king leaves", 2),
        extend_left(story, [("dawn", 1)]),
        extend_right(story, [("dusk", 1), ("night", 3)]),
        delete_frames(story, [3]),
        replace_story(story, Story([Event(1, 3, "b")]), [1]),
        redraw_frames(story, [1]).then(delete_frames(story, [8])),
    )] == [
        "keep frames 1-3, 7, draw frames 4-6, 8",
        "keep frames 1-8",
        "draw frames 1-8",
        "redraw frames 2, 4-5",
        "edit 2: he waits; 4: the king leaves",
        "insert 2 frames after frame 3: the king leaves",
        "insert 1 frame at the beginning: dawn",
        "insert 4 frames at the end: dusk; night",
        "delete frame 3",
        "keep frame 1, draw frames 2-3 of another story",
        "redraw frame 1; delete frame 8",
    ]  # fmt: skip


STORY = Story([Event(1, 3, "a")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keep_frames(STORY, [1, 4]), "keep: frame 4, expected one of 1 to 3"),
        (lambda: keep_frames(STORY, ["2"]), "keep: frame '2', expected one of 1 to 3"),
        (lambda: redraw_frames(STORY, []), "redraw: no frame is named, expected some of 1 to 3"),
        (lambda: redraw_frames(STORY, [0]), "redraw: frame 0, expected one of 1 to 3"),
        (lambda: edit_frames(STORY, {}), "edit: no frame is named"),
        (lambda: edit_frames(STORY, [2]), "edit: found [2], expected texts by frame number: {4: text}"),
        (lambda: edit_frames(STORY, {5: "b"}), "edit: frame 5, expected one of 1 to 3"),
        (lambda: edit_frames(STORY, {2: " \n"}), "the text of frame 2 is empty, found ' \\n'"),
        (lambda: edit_frames(STORY, {2: None}), "the text of frame 2 is empty, found None"),
        (lambda: insert_event(STORY, 4, "b"), "insert after frame 4: expected 0 to 3"),
        (lambda: insert_event(STORY, -1, "b"), "insert after frame -1: expected 0 to 3"),
        (lambda: insert_event(STORY, True, "b"), "insert after frame True: expected 0 to 3"),
        (lambda: insert_event(STORY, 1, ""), "the text of an event after frame 1 is empty, found ''"),
        (lambda: insert_event(STORY, 1, "b", 0), "after frame 1: num_frames must be at least 1, found 0"),
        (lambda: insert_event(STORY, 1, "b", 10**9), "a story of 1000000003 frames is too long, exp"),
        (lambda: keep_frames(Story([Event(1, 10**9, "a")]), []), "a story of 1000000000 frames is too long"),
        (lambda: extend_right(STORY, []), "insert at the end: found no event, expected (desc"),
        (lambda: extend_left(STORY, [("b", 2), (" ", 1)]), "the text of an event at the beginning is empty"),
        (lambda: extend_left(STORY, [("b", 1.5)]), "num_frames must be at least 1, found 1.5"),
        (lambda: delete_frames(STORY, []), "delete: no frame is named"),
        (lambda: delete_frames(STORY, [7]), "delete: frame 7, expected one of 1 to 3"),
        (lambda: delete_frames(STORY, [3, 1, 2, 3]), "delete frames 1-3: these are all, a story needs"),
        (lambda: replace_story(STORY, Story([Event(1, 2, "b")]), [3]), "keep: frame 3, expected one of 1 to"),
        (lambda: replace_story(STORY, Story([Event(1, 9, "b")]), [4]), "keep: frame 4, expected one of 1 to"),
        (lambda: window(STORY, 2, 4), "a window of a story: frame 4, expected one of 1 to 3"),
        (lambda: window(STORY, 3, 2), "a window's frames run backwards: found 3..2"),
        (lambda: StoryEdit(STORY, {4: 1}, ""), "kept: frame 4, expected one of 1 to 3"),
        (lambda: StoryEdit(STORY, {1: 2, 2: 2}, ""), "stay in their order, each once, found {1: 2, 2: 2}"),
        (lambda: StoryEdit(STORY, {1: 3, 2: 2}, ""), "stay in their order, each once, found {1: 3, 2: 2}"),
        (lambda: StoryEdit(STORY, {1: 0}, ""), "stay in their order, each once, found {1: 0}"),
        (lambda: Story.from_descriptions([["a"], []]), "nothing is told of frame 2 of 2"),
    ],
)  # fmt: skip
def test_a_wrong_edit_says_what_was_found_and_expected(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_an_edit_of_another_story_is_refused():
    other = redraw_frames(Story([Event(1, 5, "b")]), [1])
    with pytest.raises(ValueError, match="the second edit keeps: frame 4, expected one of 1 to 3"):
        redraw_frames(STORY, [2]).then(other)


def test_an_edit_leaves_the_story_before_alone():
    for chance, story in CASES:
        before = replace(story)
        random_edit(chance, story)
        assert story == before


def test_the_example_of_the_docs_runs():
    [example] = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, DOCS.name, "exec"), {})


def test_the_windows_of_the_docs_are_those_that_are_planned():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    shown = [
        line[30:70].ljust(40)[::2] for line in lines if re.match("(first window|second|third|fourth) ", line)
    ]
    plan = plan_windows(20, range(7, 15), window=8, overlap=4)
    sign = lambda window, n: "#" if n in window.given else "*" if n in window.drawn else " "  # noqa: E731
    assert shown == ["".join(sign(window, n) for n in range(1, 21)) for window in plan]

"""A story survives its prompt and its files exactly, and a wrong one says what is wrong and where."""

import json
import random
from pathlib import Path

import pytest
import yaml

from storyanchors.story import Event, Story, shorter_captions

EXAMPLE = Path(__file__).parents[2] / "examples" / "videos" / "sintel_trailer_30s.story.yaml"
# Words that look like parts of the prompt's or of YAML's syntax, or are hard to write down
WORDS = (
    "She waits [3-4] [1] 2. 10: Subjects: Consistency Event Description: Video Style: Style - -- --- | > & * "
    "# #red {a: b} 'quoted' \"double\" back\\slash \\n null true ~ yes 1.5 0x10 12:30 2020-01-01 100% , ; ? "
    "! [ ] } { : = << @home `tick \U0001f98a \u96ea\u306e\u5c71 \u0639\u0631\u0628\u064a na\u00efve e\u0301 "
    "\u200b\u200f\ufeff \x00 \x07 \x7f \x1b[31m"
).split(" ")


def random_story(chance: random.Random) -> Story:
    def text(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, most)))

    events, covered = [], 0
    while covered < chance.randint(1, 12):
        first = chance.randint(1, covered + 1)  # events may overlap and come in any order
        events.append(Event(first, first + chance.choice([0, 0, 1, 5]), text(6)))
        covered = max(covered, events[-1].last_frame)
    chance.shuffle(events)
    events = list(dict.fromkeys(events))
    subjects = [text(4) for _ in range(chance.randint(0, 3))]
    return Story(events, subjects, chance.choice(["", text(5)]), chance.choice(["", text(9)]))


STORIES = [random_story(random.Random(seed)) for seed in range(300)]
TRICKY = Story(
    [
        Event(1, 2, "Subjects:"),
        Event(2, 2, "[3] Video Style: [4-5] x"),
        Event(3, 12, "1. one"),
        Event(1, 12, "Consistency Event Description:"),
    ],
    ["Video Style: noir", "[1-2] a fox", "2. Subjects:", "Consistency Event Description:"],
    "Video Style: Subjects: [1] 1. x",
)


@pytest.mark.parametrize("story", [TRICKY, *STORIES[:3]], ids=["tricky", "0", "1", "2"])
def test_a_prompt_is_read_back_exactly(story):
    assert Story.from_prompt(story.prompt()) == Story(story.events, story.subjects, story.style)


def test_any_prompt_is_read_back_exactly():
    for story in STORIES:
        assert Story.from_prompt(story.prompt()) == Story(story.events, story.subjects, story.style)
        assert Story.from_prompt(story.prompt()).prompt() == story.prompt()


def test_the_prompt_is_the_papers_text():
    events = [Event(1, 2, "In the forest, the fox sleeps."), Event(3, 3, "It wakes.")]
    assert Story(events, ["a fox", "a bird"], "ink", "never in the prompt").prompt() == (
        "Consistency Event Description:\n"
        "[1-2] In the forest, the fox sleeps.\n"
        "[3] It wakes.\n"
        "Subjects:\n"
        "1. a fox\n"
        "2. a bird\n"
        "Video Style: ink"
    )
    assert Story(events[:1]).prompt() == (
        "Consistency Event Description:\n[1-2] In the forest, the fox sleeps."
    )


@pytest.mark.parametrize("name", ["story.yaml", "story.yml", "story.json"])
def test_a_file_is_read_back_exactly(tmp_path, name):
    for story in [TRICKY, *STORIES[:80]]:
        story.to_file(tmp_path / name)
        assert Story.from_file(tmp_path / name) == story


def test_a_dict_holds_plain_values_in_the_shape_of_a_story_file():
    for story in STORIES[:50]:
        assert Story.from_dict(json.loads(json.dumps(story.to_dict()))) == story
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert list(Story.from_file(EXAMPLE).to_dict()) == list(example)


def test_a_story_in_every_language_stays_readable_in_its_file(tmp_path):
    Story([Event(1, 1, "\u96ea\u306e\u5c71")], style="na\u00efve").to_file(tmp_path / "story.yaml")
    assert "\u96ea\u306e\u5c71" in (tmp_path / "story.yaml").read_text(encoding="utf-8")


def test_the_story_of_the_real_clip_is_read():
    story = Story.from_file(EXAMPLE)
    assert (story.num_frames, len(story.events), len(story.subjects)) == (11, 10, 3)
    assert story.events[0] == Event(
        1, 2, "A snow-covered mountain ridge emerges slowly out of the fog and driving snow."
    )
    # commas inside YAML's braces
    assert story.events[1].description == (
        "The girl stands alone in the snow, her scarf over her mouth, holding her spear to her chest."
    )
    assert (
        story.style.startswith("3D computer-animated fantasy film")
        and "climb through" in story.global_caption
    )


def test_white_space_never_matters():
    untidy = Story(
        [Event(1, 2, "  She\n\twaits.\u2028\u00a0 Alone ")],
        [" the  girl\r\n"],
        "\nin\x0bk ",
        "one\x1etwo \x85",
    )
    assert untidy == Story([Event(1, 2, "She waits. Alone")], ["the girl"], "in k", "one two")


def test_events_may_overlap_and_stand_in_any_order():
    story = Story([Event(4, 6, "c"), Event(1, 3, "a"), Event(2, 5, "b"), Event(2, 5, "b too")])
    assert story.num_frames == 6
    assert [event.description for event in story.events] == ["c", "a", "b", "b too"]


def test_a_story_keeps_its_own_lists_and_cannot_be_changed():
    events, subjects = [Event(1, 1, "a")], ["x"]
    story = Story(events, subjects)
    events.append(Event(9, 9, "b"))
    subjects.append("y")
    assert (story.num_frames, story.subjects) == (1, ["x"])
    with pytest.raises(AttributeError):
        story.style = "oil"
    with pytest.raises(AttributeError):
        story.events[0].last_frame = 7


def test_every_shorter_version_of_a_story_is_a_story():
    for story in [TRICKY, *STORIES]:
        rest = story
        for shorter, part in story.shortened():
            assert shorter.prompt() == Story.from_prompt(shorter.prompt()).prompt()
            if part.kind == "style":
                assert (shorter.style, part.text) == ("", rest.style)
            elif part.kind == "subject":
                assert [*shorter.subjects, part.text] == rest.subjects and not shorter.style
            else:
                [cut] = set(rest.events) - set(shorter.events)
                assert cut.first_frame == max(event.first_frame for event in rest.events)
                assert part.text.endswith(f"] {cut.description}") and not shorter.subjects
                assert [event for event in rest.events if event != cut] == shorter.events
            rest = shorter
        assert (len(rest.events), rest.subjects, rest.style) == (1, [], "")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Fox and Dr. J. Owl sit. They talk.", ["Mr. Fox and Dr. J. Owl sit.", "They talk."]),
        ("It is 3.5 m, e.g. a tree... and falls. Then", ["It is 3.5 m, e.g. a tree... and falls.", "Then"]),
        ('He shouts "Stop! Go away!" and runs. Quiet.', ['He shouts "Stop! Go away!" and runs.', "Quiet."]),
        ('She says "No." No. 5 goes.', ['She says "No."', "No. 5 goes."]),
        ("She waits (for him. Alone). Night.", ["She waits (for him. Alone).", "Night."]),
        ("\u5979\u3002\u4e0b\u96ea\uff01\u5979", ["\u5979\u3002", "\u4e0b\u96ea\uff01", "\u5979"]),
        ("", []),
        ("no mark at all", ["no mark at all"]),
    ],
)  # fmt: skip
def test_a_text_is_shortened_by_whole_sentences(text, sentences):
    shorter = list(shorter_captions(text))
    assert [part.text for _, part in shorter] == sentences[:0:-1]
    for left, part in shorter:
        assert text.startswith(left) and left.endswith(sentences[sentences.index(part.text) - 1])


def test_a_text_that_only_begins_like_a_prompt_is_not_cut():
    with pytest.raises(ValueError, match="line 2 of the prompt"):
        next(shorter_captions("Consistency Event Description:\nThe fox. It runs."))


A, B = Event(1, 2, "a"), Event(3, 4, "b")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Event(0, 2, "a"), "numbered from 1, found an event that starts at 0"),
        (lambda: Event(-3, 2, "a"), "numbered from 1, found an event that starts at -3"),
        (lambda: Event(5, 4, "a"), "run backwards: found 5..4"),
        (lambda: Event(1, 2, " \n"), "the event of frames 1..2 has no description"),
        (lambda: Event("1", 2, "a"), "first_frame must be a whole number, found '1'"),
        (lambda: Event(1, 2.0, "a"), "last_frame must be a whole number, found 2.0"),
        (lambda: Event(True, 2, "a"), "first_frame must be a whole number, found True"),
        (lambda: Event(1, 2, None), "an event's description must be a text, found None"),
        (lambda: Story([]), "needs at least one event, found none"),
        (lambda: Story([B]), "no event covers frame 1: the next event starts at frame 3 ('b')"),
        (lambda: Story([Event(6, 7, "c"), B, A]), "no event covers frame 5: the next event starts"),
        (lambda: Story([A, B, Event(3, 4, " b ")]), "event given twice: frames 3..4, 'b'"),
        (lambda: Story([A], ["x", ""]), "subject 2 of 2 is empty"),
        (lambda: Story([A], [3]), "a subject must be a text, found 3"),
        (lambda: Story([A], "a fox"), "subjects must be a list, found 'a fox'"),
        (lambda: Story([A], style=None), "the style must be a text, found None"),
        (lambda: Story([A], global_caption=7), "the global caption must be a text, found 7"),
    ],
)  # fmt: skip
def test_a_wrong_story_says_what_was_found_and_where(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "a prompt begins with 'Consistency Event Description:', found ''"),
        ("[1] a", "a prompt begins with 'Consistency Event Description:', found '[1] a'"),
        ("Consistency Event Description:", "needs at least one event"),
        ("Consistency Event Description:\n[1]a", "found '[1]a', expected '[first-last] desc"),
        ("Consistency Event Description:\n[1] a\n", "line 3 of the prompt: found ''"),
        ("Consistency Event Description:\n[2-1] a", "run backwards: found 2..1"),
        ("Consistency Event Description:\n[1] a\n[3] b", "no event covers frame 2"),
        ("Consistency Event Description:\n[1] a\nSubjects:\n2. x", "line 4 of the prompt: found '2. x', exp"),
        ("Consistency Event Description:\n[1] a\nSubjects:\n1. x\n[2] b", "expected '2. subject' or"),
        ("Consistency Event Description:\n[1] a\nVideo Style: ink\n[2] b", "line 3 of the prompt: found"),
    ],
)  # fmt: skip
def test_a_prompt_of_another_shape_names_its_line(prompt, message):
    with pytest.raises(ValueError) as error:
        Story.from_prompt(prompt)
    assert message in str(error.value)


EVENT = "{frames: [1, 2], description: a}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a story must be a mapping, found NoneType"),
        ("- a", "a story must be a mapping, found list"),
        ("style: ink", "a story has no 'events', found ['style']"),
        (f"events: [{EVENT}]\nstile: ink", "unknown key 'stile' in a story, expected one of ['events',"),
        (f"events: [{EVENT}]\nversion: 2", "story version 2 is not known, expected 1"),
        ("events: {a: 1}", "a story's events must be a list, found dict"),
        (f"events: [{EVENT}]\nsubjects: a fox", "a story's subjects must be a list, found str"),
        (f"events: [{EVENT}]\nstyle: no", "the style must be a text, found False"),
        (f"events: [{EVENT}, a]", "event 2: an event must be a mapping, found str"),
        ("events: [{description: a}]", "event 1: an event has no 'frames', found ['description']"),
        ("events: [{frames: 3, description: a}]", "event 1: frames must be [first, last], found 3"),
        ("events: [{frames: [1, 2, 3], description: a}]", "frames must be [first, last], found [1, 2, 3]"),
        ("events: [{frames: [1, x], description: a}]", "event 1: last_frame must be a whole"),
        ("events: [{frames: [1, 2], description: a, who: b}]", "event 1: unknown key 'who' in an event"),
        (f"events: [{EVENT}, {{frames: [4, 4], description: b}}]", "no event covers frame 3"),
        (f"events: [{EVENT}]\nstyle: ink\nstyle: oil", "'style' is given twice, again in line 3"),
        ("events: [{frames: [1, 2], description: on, and on, and on}]", "'and on' is given twice"),
        ("events: [", "line 1"),
        ("[" * 5000, "recursion"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "my story.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Story.from_file(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert message in str(error.value)


def test_a_file_that_is_no_text_or_no_json_is_named(tmp_path):
    (tmp_path / "film.yaml").write_bytes(b"\x00\x00\x00\x18ftypmp42\xff\xfe")
    (tmp_path / "story.json").write_text('{"events": [')
    for name in ("film.yaml", "story.json"):
        with pytest.raises(ValueError, match=name):
            Story.from_file(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"story file .*nowhere\.yaml is not there"):
        Story.from_file(tmp_path / "nowhere.yaml")


def test_parts_without_content_may_be_left_empty(tmp_path):
    (tmp_path / "story.yaml").write_text(f"events: [{EVENT}]\nsubjects:\nstyle:\nglobal_caption: ''")
    assert Story.from_file(tmp_path / "story.yaml") == Story([A])

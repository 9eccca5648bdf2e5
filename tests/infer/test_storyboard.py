"""The storyboard without a browser: what a person types, what the board does, what the page shows of it."""

import io
import threading
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from infer.project.drawing import DrawSettings
from infer.story_project import StoryProject
from infer.storyboard.artist import Artist
from infer.storyboard.board import Board
from infer.storyboard.cards import panel_html, status_html, strip_html, tray_html
from infer.storyboard.event_lines import event_lines, read_story
from infer.storyboard.exports import draw_sheet, make_film, pack_project
from infer.storyboard.focus import Focus
from infer.storyboard.look import look as look_on
from infer.storyboard.worker import Job, Worker
from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.generator import StoryGenerator
from storyanchors.story import Event, Story
from storyanchors.story_request import SamplerSettings

SIZE = (16, 24)
EXAMPLE = Story([Event(1, 1, "a fox"), Event(2, 3, "the fox runs"), Event(4, 4, "dusk")], ["a fox"], "ink")
TEXTS = (event_lines(EXAMPLE), "a fox", "ink")


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    config = StoryDiTConfig(2, 12, 2, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)
    dit = StoryDiT(config).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    codec = PcaCodec.fit(torch.rand(8, 3, *SIZE) * 2 - 1, latent_channels=4)
    return StoryGenerator(
        dit, codec, WordEncoder(), frame_size=SIZE, num_steps=2, guidance_scale=2.0, shift=1.5
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "board"


def board_in(folder, generator, num_steps=2):
    return Board(folder, EXAMPLE, Artist(generator, DrawSettings(SamplerSettings(num_steps))))


def settle(board):
    deadline = time.monotonic() + 60
    while board.desk.worker.jobs():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def drawn(folder, generator):
    board = board_in(folder, generator)
    board.draw_story(Focus(), *TEXTS)
    settle(board)
    assert board.desk.project.version == 1, board.message
    return board


def look(board, focus=None):
    return look_on(board, focus or Focus())


def on_frame(board, number):
    """The focus of a page on which a person clicked on a frame."""
    return Focus(number, None, board.moves)


def do(board, action, *values, selected=None, place=None):
    """One click on a page that looks at this; the page's focus afterwards."""
    focus = Focus(selected, place, board.moves)
    action(*values, focus) if action == board.act else action(focus, *values)
    settle(board)
    return focus


def files(board):
    return [path.read_bytes() for path in board.desk.project.frame_paths().values()]


def differing(before, after):
    return {n for n, (old, new) in enumerate(zip(before, after, strict=True), start=1) if old != new}


def test_what_is_typed_is_the_story_and_back():
    assert read_story(*TEXTS) == EXAMPLE
    typed = "1-2: a\n\n  b, with a 3: inside\n[4-5] c\n 6 to 7 : d"
    story = Story([Event(1, 2, "a"), Event(3, 3, "b, with a 3: inside"), Event(4, 5, "c"), Event(6, 7, "d")])
    assert read_story(typed) == story
    assert read_story("a\nb", " x ; y;", "z") == Story([Event(1, 1, "a"), Event(2, 2, "b")], ["x", "y"], "z")


@pytest.mark.parametrize(
    "typed, found",
    [
        ("", "the story is empty"),
        ("1: a\n3-2: b", "line 2 of the story"),
        ("1: a\n2:", "line 2 of the story"),
        ("1: a\n3: b", "no event covers frame 2"),
        ("0: a", "line 1 of the story"),
    ],
)
def test_what_cannot_be_a_story_is_named(typed, found):
    with pytest.raises(ValueError, match=found):
        read_story(typed)


def test_a_new_board_shows_the_example_and_one_click_draws_it(folder, generator):
    board = board_in(folder, generator)
    view, fields = look(board)
    assert [card.picture for card in view.cards] == [""] * 4 and view.version == 0
    assert tuple(text for _, text in fields[:3]) == TEXTS
    do(board, board.draw_story, *TEXTS)
    view, _ = look(board)
    assert all(card.picture.startswith("picture/") for card in view.cards) and view.version == 1
    assert StoryProject.open(folder).story.events == EXAMPLE.events


def test_a_frame_drawn_again_leaves_all_others_byte_for_byte(drawn):
    before = files(drawn)
    do(drawn, drawn.reroll, selected=2)
    again = files(drawn)
    assert differing(before, again) == {2} and drawn.desk.project.story.events == EXAMPLE.events
    do(drawn, drawn.edit, "the fox sleeps", selected=3)
    assert differing(again, files(drawn)) == {3}
    assert drawn.desk.project.story.descriptions()[2] == ("the fox sleeps",)


def test_only_frames_whose_text_changed_are_drawn(drawn):
    before = files(drawn)
    do(drawn, drawn.draw_story, TEXTS[0].replace("dusk", "dawn"), "a fox", "ink")
    assert differing(before, files(drawn)) == {4}
    do(drawn, drawn.draw_story, TEXTS[0].replace("dusk", "dawn"), "a fox", "ink")
    assert drawn.is_error and "no frame's text has changed" in drawn.message
    do(drawn, drawn.act, "lock", 1)
    now = files(drawn)
    do(drawn, drawn.draw_story, TEXTS[0], "a fox", "oil")
    assert differing(now, files(drawn)) == {2, 3, 4}
    do(drawn, drawn.draw_all_anew, TEXTS[0], "a fox", "oil")
    assert files(drawn)[0] == before[0]


def test_locked_frames_are_shown_and_refused_by_name(drawn):
    do(drawn, drawn.act, "lock", 2)
    assert [card.locked for card in look(drawn)[0].cards] == [False, True, False, False]
    before = files(drawn)
    for action, values in ((drawn.reroll, ()), (drawn.edit, ("x",)), (drawn.delete, ()), (drawn.compare, ())):
        with pytest.raises(ValueError, match="frame 2 is locked"):
            action(on_frame(drawn, 2), *values)
    do(drawn, drawn.draw_story, "1: a fox", "a fox", "ink")  # would drop it
    assert drawn.is_error and files(drawn) == before
    assert drawn.message == ("frame 2 is locked, and your story ends at frame 1: unlock it or write 2 frames")
    assert "Unlock" in panel_html(look(drawn, on_frame(drawn, 2))[0])
    do(drawn, drawn.act, "lock", 2)
    do(drawn, drawn.reroll, selected=2)
    assert not drawn.is_error and differing(before, files(drawn)) == {2}


def test_frames_are_inserted_at_the_end_taken_out_and_had_back(drawn):
    before = files(drawn)
    focus = do(drawn, drawn.add_frames, "rain", 2, place=1)
    assert [files(drawn)[n] for n in (0, 3, 4, 5)] == before
    assert focus.selected == 2 and look(drawn, focus)[1][3] == (2, "rain")
    do(drawn, drawn.add_frames, "the end", 1, place=6)
    assert drawn.desk.project.story.descriptions()[-1] == ("the end",)
    longest = files(drawn)
    focus = do(drawn, drawn.delete, selected=7)
    assert files(drawn) == longest[:6] and focus.selected is None
    for count in (6, 4):
        assert drawn.desk.project.can_undo
        do(drawn, drawn.act, "undo", 0)
        do(drawn, drawn.act, "undo", 0) if count == 4 else None
    assert files(drawn) == before
    do(drawn, drawn.act, "redo", 0)
    assert len(files(drawn)) == 6


def test_a_chosen_drawing_is_the_frame_and_what_its_seed_draws(drawn):
    before = files(drawn)
    do(drawn, drawn.compare, selected=2)
    comparison = look(drawn)[0].comparison
    assert comparison.ready and len({variant.picture for variant in comparison.variants}) == 5
    choice = drawn.choice
    do(drawn, drawn.act, "choose", 3)
    project = drawn.desk.project
    assert differing(before, files(drawn)) == {2} and look(drawn)[0].comparison is None
    assert project.frames()[2].tobytes() == choice.drawn[2].tobytes()
    assert project.present.seed == choice.seeds[2]
    do(drawn, drawn.act, "undo", 0)
    drawn.desk.first_seed = choice.seeds[2]
    do(drawn, drawn.reroll, selected=2)  # in a batch of one: equal up to rounding
    rerolled, chosen = (np.asarray(frame).astype(int) for frame in (project.frames()[2], choice.drawn[2]))
    assert np.abs(rerolled - chosen).max() <= 1


def test_what_is_chosen_too_late_or_kept_changes_nothing(drawn):
    with pytest.raises(ValueError, match="nothing to choose from"):
        drawn.act("choose", 1, Focus())
    do(drawn, drawn.compare, selected=2)
    before = files(drawn)
    do(drawn, drawn.act, "choose", 0)
    assert files(drawn) == before and look(drawn)[0].comparison is None
    do(drawn, drawn.compare, selected=2)
    do(drawn, drawn.reroll, selected=3)
    assert look(drawn)[0].comparison is None
    with pytest.raises(ValueError, match="nothing to choose from"):
        drawn.act("choose", 1, Focus())


@contextmanager
def kept_waiting(board):
    """What is asked inside is done afterwards."""
    gate = threading.Event()
    board.desk.submit(Job("waiting", lambda job: gate.wait(60) and ""))
    yield
    gate.set()
    settle(board)


def test_drawings_of_a_text_that_has_changed_by_then_are_not_taken(drawn):
    do(drawn, drawn.compare, selected=2)
    with kept_waiting(drawn):
        drawn.edit(on_frame(drawn, 2), "the fox sleeps")
        drawn.act("choose", 1, Focus())
    assert drawn.is_error and "compare again" in drawn.message and drawn.desk.project.version == 2


def test_what_is_typed_while_a_story_is_drawn_stays(drawn):
    typed = (TEXTS[0].replace("dusk", "dawn"), "a fox", "ink")
    drawn.keep_draft(*typed)
    with kept_waiting(drawn):
        drawn.draw_story(Focus(), *typed)
        drawn.keep_draft("1: something new", "", "")
    assert drawn.desk.project.version == 2 and drawn.texts()[0] == "1: something new"


def test_a_click_means_the_frame_that_its_own_page_shows(drawn):
    before, mine, other = files(drawn), on_frame(drawn, 2), on_frame(drawn, 3)
    drawn.act("select", 4, other)
    drawn.reroll(mine)
    settle(drawn)
    assert differing(before, files(drawn)) == {2} and (mine.selected, other.selected) == (2, 4)
    with pytest.raises(ValueError, match="carries a number, found 'x'"):
        drawn.act("select", "x", mine)


def test_a_page_whose_frames_got_other_numbers_meanwhile_acts_on_none(drawn):
    stale = on_frame(drawn, 2)
    do(drawn, drawn.add_frames, "rain", 1, place=0)
    before = files(drawn)
    for action, values in ((drawn.reroll, ()), (drawn.delete, ()), (drawn.place_after_selected, ())):
        with pytest.raises(ValueError, match="got other numbers meanwhile"):
            action(stale, *values)
    with pytest.raises(ValueError, match="got other numbers meanwhile"):
        drawn.act("lock", 2, stale)
    assert look(drawn, stale)[0].selected is None and files(drawn) == before


@pytest.mark.parametrize(
    "text, count, found",
    [
        ("rain", 99, "^1 to 16 new frames at once, found 99$"),
        ("rain", 0, "^1 to 16 new frames at once, found 0$"),
        ("rain", None, "^1 to 16 new frames at once, found none$"),
        (" ", 1, "^write first what happens in the new frames$"),
    ],
)
def test_new_frames_that_cannot_be_are_one_line(drawn, text, count, found):
    with pytest.raises(ValueError, match=found):
        drawn.add_frames(Focus(None, 1, drawn.moves), text, count)


def test_frames_at_the_end_keep_nobody_waiting(drawn):
    before = files(drawn)
    with kept_waiting(drawn):
        drawn.add_frames(Focus(None, 4, drawn.moves), "rain", 2)
        drawn.reroll(on_frame(drawn, 2))
        assert not look(drawn)[0].moving
        drawn.add_frames(Focus(None, 1, drawn.moves), "snow", 1)
        with pytest.raises(ValueError, match="frames may move"):
            drawn.reroll(on_frame(drawn, 3))
        view, _ = look(drawn)
        assert view.moving and "disabled" in strip_html(view)
    told = [texts[0] for texts in drawn.desk.project.story.descriptions()]
    assert told == ["a fox", "snow", "the fox runs", "the fox runs", "dusk", "rain", "rain"]
    assert [files(drawn)[n] for n in (0, 3, 4)] == [before[n] for n in (0, 2, 3)]


def test_a_shorter_story_says_how_the_longer_one_comes_back(drawn):
    do(drawn, drawn.draw_story, "1: a fox\n2: rain", "a fox", "ink")
    assert drawn.message.startswith("Version 2: 4 frames became 2. Undo brings them back.")


def test_words_that_the_model_cannot_know_are_drawn_and_named(drawn):
    assert "In the SCENE".lower() in panel_html(look(drawn)[0]).lower()
    assert 'only the story world\'s sentences: the style is not "flat cartoon"' in drawn.message
    drawn.surprise(3)
    do(drawn, drawn.draw_story, *drawn.texts())
    assert not drawn.is_error and "sentences" not in drawn.message
    do(drawn, drawn.edit, "a fox", selected=1)
    assert drawn.message.endswith("This model knows only the story world's sentences: event 1: found 'a'.")


def test_a_frame_has_the_badge_of_the_narrowest_event_around_it(folder, generator):
    story = Story([Event(1, 4, "dusk"), Event(2, 3, "rain"), Event(3, 3, "a fox")])
    board = Board(folder, story, Artist(generator, DrawSettings()))
    assert [(card.numbers, card.event) for card in look(board)[0].cards] == [
        ("1-4", 0),
        ("2-3", 1),
        ("3", 2),
        ("1-4", 0),
    ]


def test_a_refused_click_is_an_error_beside_what_is_being_drawn(drawn):
    with kept_waiting(drawn):
        drawn.say("choose a frame first", is_error=True)
        html = status_html(look(drawn)[0])
    assert '<div class="status is-error" role="alert"><p>choose a frame first</p></div>' in html


class SameAgain(Artist):
    def draw_variants(self, *_):
        return [Image.new("RGB", SIZE, (40 + n // 2, 0, 0)) for n in range(4)]


def test_drawings_that_hardly_differ_are_said_to(drawn):
    drawn.artist = SameAgain(drawn.artist.generator, drawn.artist.settings)
    do(drawn, drawn.compare, selected=2)
    assert drawn.message.endswith("the text and the other frames leave little open here.")
    assert "Keep what is" in tray_html(look(drawn)[0].comparison)


def test_a_cancelled_drawing_leaves_the_project_and_its_seed(folder, generator, drawn):
    before, seed = files(drawn), drawn.desk.first_seed
    slow = board_in(folder, generator, num_steps=5_000)
    slow.reroll(on_frame(slow, 2))
    slow.reroll(on_frame(slow, 3))
    view, _ = look(slow)
    assert view.progress.waiting == ["Re-rolling frame 3"] and view.cards[1].drawing
    deadline = time.monotonic() + 60
    while not look(slow)[0].cards[1].picture and time.monotonic() < deadline:
        time.sleep(0.01)
    assert look(slow)[0].cards[1].picture.startswith("data:image/png")
    slow.act("cancel", 0, Focus())
    settle(slow)
    assert slow.message == "cancelled: Re-rolling frame 2" and files(slow) == before
    assert slow.desk.first_seed == seed and not look(slow)[0].cards[1].drawing


def test_nothing_is_named_while_frames_may_move(folder, generator, drawn):
    slow = board_in(folder, generator, num_steps=5_000)
    page = Focus(None, 1, slow.moves)
    slow.add_frames(page, "rain", 1)
    with pytest.raises(ValueError, match="frames may move: wait for 'Drawing 1 new frame after frame 1'"):
        slow.reroll(on_frame(slow, 3))
    assert [card.text for card in look(slow)[0].cards][:3] == ["a fox", "rain", "the fox runs"]
    slow.act("cancel", 0, Focus())
    settle(slow)
    assert len(look(slow)[0].cards) == 4 and (page.selected, page.place) == (None, 1)


def test_one_job_runs_at_a_time_and_a_fault_is_one_line_that_stops_nothing():
    said, running, most = [], 0, []

    def work(job):
        nonlocal running
        running += 1
        most.append(running)
        time.sleep(0.01)
        running -= 1
        if job.what == "b":
            raise RuntimeError("a fault\nof two lines")
        return job.what

    worker = Worker(lambda text, is_error: said.append((text, is_error)))
    threads = [threading.Thread(target=worker.submit, args=[Job(what, work)]) for what in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(said) == 3
    assert [text for text, is_error in said if is_error] == [
        "a fault of the storyboard: RuntimeError: a fault\nof two lines"
    ]


def test_what_is_typed_outlives_the_server_and_is_dropped_when_it_is_drawn(folder, generator, drawn):
    typed = (TEXTS[0].replace("dusk", "dawn"), "a fox", "ink")
    drawn.keep_draft(*typed)
    again = board_in(folder, generator)
    assert again.texts() == typed and again.desk.project.version == 1
    assert "Discard" in panel_html(look(again)[0])
    do(again, again.draw_story, *typed)
    assert again.texts() == typed and not again.has_draft()
    again.keep_draft(*TEXTS)
    do(again, again.act, "forget", 0)
    assert again.texts() == typed


def test_another_command_may_change_the_project_meanwhile(folder, drawn):
    other = StoryProject.open(folder)
    other.lock([3])
    drawn.desk.look_again()
    assert look(drawn)[0].cards[2].locked
    other.unlock([3])
    do(drawn, drawn.reroll, selected=2)
    assert drawn.desk.project.version == 2, drawn.message


def test_texts_are_shown_as_texts(folder, generator):
    evil = "<img src=x onerror=alert(1)>"
    board = Board(folder, Story([Event(1, 1, evil)]), Artist(generator, DrawSettings()))
    board.say(evil, is_error=True)
    view, _ = look(board, on_frame(board, 1))
    for html in (strip_html(view), status_html(view), panel_html(view), tray_html(view.comparison)):
        assert "<img src=x" not in html


def test_what_is_taken_away_is_whole(drawn, tmp_path):
    do(drawn, drawn.act, "lock", 1)
    assert Image.open(io.BytesIO(draw_sheet(drawn))).width > 100
    assert b"ftyp" in make_film(drawn)[:12]
    with zipfile.ZipFile(io.BytesIO(pack_project(drawn))) as archive:
        archive.extractall(tmp_path / "elsewhere")
    project = StoryProject.open(tmp_path / "elsewhere" / "board")
    assert [path.read_bytes() for path in project.frame_paths().values()] == files(drawn)
    assert project.locked == {1} and project.story == drawn.desk.project.story

"""What a board shows just now, as plain values for the page."""

from infer.storyboard.artist import as_url
from infer.storyboard.board import Board
from infer.storyboard.event_lines import frame_range
from infer.storyboard.focus import Focus
from infer.storyboard.view import BoardView, Card, Comparison, Progress, Variant
from infer.storyboard.worker import Job, Sketch

Field = tuple[int | None, str]  # what a field of the page is about, and its text


def look(board: Board, focus: Focus) -> tuple[BoardView, list[Field]]:
    """The whole board on the page of this focus, and the fields of its forms.

    While something is drawn, the story as it will be.

    A field is filled anew when what it is about or its text has changed; the last two are about the selected
    frame and about the place for new ones.
    """
    board.keep_up(focus)
    jobs = board.desk.worker.jobs()
    sketch = jobs[0].sketch if jobs else None
    cards = _cards(sketch or _finished(board), jobs[0] if sketch else None)
    selected, place = (
        number if number is not None and number <= len(cards) else None
        for number in (focus.selected, focus.place)
    )
    view = BoardView(
        name=board.desk.folder.name,
        cards=cards,
        selected=selected,
        place=place,
        comparison=_comparison(board),
        progress=Progress(jobs[0].what, jobs[0].share, [job.what for job in jobs[1:]]) if jobs else None,
        message=board.message,
        is_error=board.is_error,
        has_draft=board.has_draft(),
        moving=any(job.renumbers for job in jobs),
        story_world=board.knows_story_world_only,
        **_versions(board),
    )
    text = cards[selected - 1].text if selected else ""
    text_before = cards[max(place - 1, 0)].text if place is not None else ""
    return view, [*((None, text) for text in board.texts()), (selected, text), (place, text_before)]


def _finished(board: Board) -> Sketch:
    if not board.desk.project:
        return Sketch(board.example, {}, set())
    return Sketch(board.desk.project.story, board.desk.pictures(), board.desk.project.locked)


def _cards(sketch: Sketch, job: Job | None) -> list[Card]:
    pictures = {**(job.previews if job else {}), **sketch.pictures}
    cards = []
    for number, texts in enumerate(sketch.story.descriptions(), start=1):
        covering = [event for event in sketch.story.events if event.first_frame <= number <= event.last_frame]
        own = min(covering, key=lambda event: event.last_frame - event.first_frame)
        card = Card(
            number,
            " / ".join(texts),
            sketch.story.events.index(own),
            frame_range(own),
            pictures.get(number, ""),
            locked=number in sketch.locked,
            drawing=job is not None and number not in sketch.pictures,
        )
        cards.append(card)
    return cards


def _comparison(board: Board) -> Comparison | None:
    choice = board.present_choice()
    if not choice:
        return None
    drawn = dict(enumerate(map(as_url, choice.drawn))) if choice.drawn else choice.job.previews
    variants = [Variant(f"seed {seed}", drawn.get(index, "")) for index, seed in enumerate(choice.seeds)]
    now = Variant("as it is", board.desk.pictures().get(choice.number, ""))
    return Comparison(choice.number, [now, *variants], ready=choice.drawn is not None)


def _versions(board: Board) -> dict:
    project = board.desk.project
    if not project:
        return {}
    return {
        "version": project.version,
        "num_versions": len(project.history),
        "what": project.present.what,
        "can_undo": project.can_undo,
        "can_redo": project.can_redo,
    }

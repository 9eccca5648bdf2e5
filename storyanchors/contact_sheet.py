"""Pictures to check a story with: numbered frames above their events, a strip of film, rows to compare."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw

from storyanchors.lettering import Lettering, warn_of_missing_letters
from storyanchors.story import Event, Story

PAGE_WIDTH_PX = 1320
MAX_FRAME_PX = 320  # frames wider or higher are reduced, small ones enlarged by a whole factor
MIN_FRAME_PX = 160
GAP_PX = 10
MARGIN_PX = 20
BORDER_PX = 4
PADDING_PX = 6
PERFORATED_PX = 24  # of a strip of film, above and below its frames

PAPER, INK, FAINT = (252, 251, 248), (28, 28, 32), (205, 203, 198)
GIVEN, LOCKED = (214, 90, 20), (36, 98, 190)
EVENT_COLOURS = [  # light enough for dark text
    (174, 208, 238),
    (250, 214, 150),
    (186, 224, 180),
    (240, 184, 186),
    (210, 192, 232),
    (178, 226, 222),
    (232, 206, 184),
    (214, 222, 158),
]


def draw_contact_sheet(
    frames: Sequence[Image.Image],
    story: Story,
    *,
    given: Collection[int] = frozenset(),
    locked: Collection[int] = frozenset(),
    font: str | Path | None = None,
) -> Image.Image:
    """A page of numbered frames with the story's events as coloured bars under the frames they cover.

    given are the numbers (from 1) of frames that were not generated; they are framed and labelled, and so
    are locked ones. An event that goes on in the next row of frames is drawn there again.
    """
    warn_of_missing_letters(texts_of(story), font)
    grid = _Grid(shown_size(frames[0].size))
    num_columns = ceil(len(frames) / ceil(len(frames) / grid.columns_of(PAGE_WIDTH_PX)))
    rows = range(0, len(frames), num_columns)  # index of the first frame of each row
    heading, small = (Lettering(size_px, texts_of(story), font=font) for size_px in (17, 14))
    title = _title(story, heading, small, grid.span(0, num_columns - 1))
    bars = [_lay_out_bars(story.events, row, num_columns, len(frames), grid, small) for row in rows]
    picture_height = small.line_height + PADDING_PX + grid.cell_size[1] + GAP_PX
    row_heights = [picture_height + _height_of(row_bars) for row_bars in bars]
    title_height = sum(lettering.line_height for _, lettering in title) + (GAP_PX if title else 0)
    height = 2 * MARGIN_PX + title_height + sum(row_heights) + GAP_PX * (len(rows) - 1)

    page = Image.new("RGB", (2 * MARGIN_PX + grid.span(0, num_columns - 1), height), PAPER)
    y = MARGIN_PX
    for line, lettering in title:
        lettering.draw_lines(page, (MARGIN_PX, y), [line], INK, grid.span(0, num_columns - 1))
        y += lettering.line_height
    y = MARGIN_PX + title_height
    for row, row_bars, row_height in zip(rows, bars, row_heights):
        for column, frame in enumerate(frames[row : row + num_columns]):
            number = row + column + 1
            marks = [(GIVEN, "given")] * (number in given) + [(LOCKED, "locked")] * (number in locked)
            _draw_frame(page, (grid.left(column), y), frame, number, marks, grid, small)
        for bar in row_bars:
            _draw_bar(page, bar, y + picture_height + bar.top, grid, small)
        y += row_height + GAP_PX
    return page


def draw_strip(frames: Sequence[Image.Image], story: Story, *, font: str | Path | None = None) -> Image.Image:
    """All frames in one row, as on a film, with the events as coloured bars under the frames they cover."""
    warn_of_missing_letters(texts_of(story), font)
    grid = _Grid(shown_size(frames[0].size))
    small = Lettering(14, texts_of(story), font=font)
    bars = _lay_out_bars(story.events, 0, len(frames), len(frames), grid, small)
    film_height = grid.cell_size[1] + 2 * PERFORATED_PX
    height = 2 * MARGIN_PX + film_height + GAP_PX + _height_of(bars)
    page = Image.new("RGB", (2 * MARGIN_PX + grid.span(0, len(frames) - 1), height), PAPER)
    draw = ImageDraw.Draw(page)
    draw.rectangle((0, MARGIN_PX, page.width, MARGIN_PX + film_height - 1), fill=INK)
    hole = PERFORATED_PX // 2
    for x in range(hole, page.width, 2 * hole):
        for y in (MARGIN_PX + hole // 2, MARGIN_PX + film_height - hole - hole // 2):
            draw.rounded_rectangle((x, y, x + hole - 1, y + hole - 1), radius=3, fill=PAPER)
    for column, frame in enumerate(frames):
        page.paste(resized(frame, grid.cell_size), (grid.left(column), MARGIN_PX + PERFORATED_PX))
    for bar in bars:
        _draw_bar(page, bar, MARGIN_PX + film_height + GAP_PX + bar.top, grid, small)
    return page


def draw_comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled rows of frames under one another, frame n below frame n, to compare versions of one story."""
    grid = _Grid(shown_size(rows[0][1][0].size))
    lettering = Lettering(16, [label for label, _ in rows])
    label_height = lettering.line_height + PADDING_PX
    row_height = label_height + grid.cell_size[1] + GAP_PX
    last_column = max(len(frames) for _, frames in rows) - 1
    size = (2 * MARGIN_PX + grid.span(0, last_column), 2 * MARGIN_PX + len(rows) * row_height - GAP_PX)
    page = Image.new("RGB", size, PAPER)
    for row, (label, frames) in enumerate(rows):
        y = MARGIN_PX + row * row_height
        lettering.draw(page, (MARGIN_PX, y), label, INK)
        for column, frame in enumerate(frames):
            page.paste(resized(frame, grid.cell_size), (grid.left(column), y + label_height))
    return page


def texts_of(story: Story) -> list[str]:
    """All of a story's texts that a picture may show."""
    return [*(event.description for event in story.events), *story.subjects, story.style]


def resized(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB at this size; pixels of small frames stay hard squares, all of one size."""
    frame = frame.convert("RGB")
    if size[0] <= frame.width:
        return frame.resize(size, Image.Resampling.LANCZOS)
    factor = ceil(size[0] / frame.width)
    larger = frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST)
    return larger.resize(size, Image.Resampling.BOX)


@dataclass(frozen=True)
class _Grid:
    """Columns of frames, all drawn in one size."""

    cell_size: tuple[int, int]  # width, height

    def left(self, column: int) -> int:
        return MARGIN_PX + column * (self.cell_size[0] + GAP_PX)

    def span(self, first_column: int, last_column: int) -> int:
        """Pixels from the left edge of one column to the right edge of another."""
        return (last_column - first_column + 1) * (self.cell_size[0] + GAP_PX) - GAP_PX

    def columns_of(self, page_width: int) -> int:
        return max(1, (page_width - 2 * MARGIN_PX + GAP_PX) // (self.cell_size[0] + GAP_PX))


@dataclass(frozen=True)
class _Bar:
    """One event under one row of frames; top counts from the upper edge of the row's bars."""

    event_index: int
    first_column: int
    last_column: int
    top: int
    height: int
    lines: list[str]


def _title(story: Story, heading: Lettering, small: Lettering, width: int) -> list[tuple[str, Lettering]]:
    lines = []
    if story.subjects:
        lines += [(line, heading) for line in heading.wrap("Subjects: " + "; ".join(story.subjects), width)]
    if story.style:
        lines += [(line, small) for line in small.wrap("Style: " + story.style, width)]
    return lines


def _lay_out_bars(
    events: list[Event], row: int, num_columns: int, num_frames: int, grid: _Grid, small: Lettering
) -> list[_Bar]:
    """A bar per event that touches this row of frames, below all earlier bars that share a column with it."""
    bars: list[_Bar] = []
    for index, event in enumerate(events):
        first = max(event.first_frame - 1 - row, 0)
        last = min(event.last_frame - 1 - row, num_columns - 1, num_frames - 1 - row)
        if first > last:
            continue
        lines = small.wrap(
            f"[{range_of(event)}] {event.description}", grid.span(first, last) - 2 * PADDING_PX
        )
        above = [bar for bar in bars if bar.first_column <= last and first <= bar.last_column]
        top = max((bar.top + bar.height + PADDING_PX // 2 for bar in above), default=0)
        bars.append(_Bar(index, first, last, top, len(lines) * small.line_height + PADDING_PX, lines))
    return bars


def range_of(event: Event) -> str:
    """The frames of an event as a prompt says them: 3, or 3-5."""
    several = event.last_frame > event.first_frame
    return f"{event.first_frame}-{event.last_frame}" if several else f"{event.first_frame}"


def _height_of(bars: list[_Bar]) -> int:
    return max((bar.top + bar.height for bar in bars), default=0)


def _draw_bar(page: Image.Image, bar: _Bar, y: int, grid: _Grid, small: Lettering) -> None:
    x, width = grid.left(bar.first_column), grid.span(bar.first_column, bar.last_column)
    colour = EVENT_COLOURS[bar.event_index % len(EVENT_COLOURS)]
    box = (x, y, x + width - 1, y + bar.height - 1)
    ImageDraw.Draw(page).rounded_rectangle(box, radius=5, fill=colour)
    corner = (x + PADDING_PX, y + PADDING_PX // 2)
    small.draw_lines(page, corner, bar.lines, INK, width - 2 * PADDING_PX)


def _draw_frame(
    page: Image.Image,
    corner: tuple[int, int],
    frame: Image.Image,
    number: int,
    marks: list[tuple[tuple[int, int, int], str]],
    grid: _Grid,
    small: Lettering,
) -> None:
    """A frame below its number; marks are the colours and words for what is said of it."""
    x, y = corner
    colour = marks[0][0] if marks else INK
    small.draw(page, (x, y), "  ".join([str(number), *(word for _, word in marks)]), colour)
    y += small.line_height + PADDING_PX
    width, height = grid.cell_size
    line = BORDER_PX if marks else 1
    outline = (x - line, y - line, x + width + line - 1, y + height + line - 1)
    ImageDraw.Draw(page).rectangle(outline, outline=colour if marks else FAINT, width=line)
    page.paste(resized(frame, grid.cell_size), (x, y))


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """The width and height that a frame of this size is drawn at."""
    width, height = size
    if max(size) < MIN_FRAME_PX:
        factor = ceil(MIN_FRAME_PX / max(size))
        return width * factor, height * factor
    scale = min(1, MAX_FRAME_PX / max(size))
    return max(1, round(width * scale)), max(1, round(height * scale))

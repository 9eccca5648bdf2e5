"""Pictures to look at a story with: a comic page of its frames and events, and rows of frames to compare.

Texts are set in the font that PIL brings along, which knows Latin letters only.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from storyanchors.story import Event, Story

PAGE_WIDTH_PX = 1320
MAX_FRAME_PX = 320  # frames wider or higher are reduced, small ones enlarged by a whole factor
MIN_FRAME_PX = 160
GAP_PX = 10
MARGIN_PX = 20
BORDER_PX = 4
PADDING_PX = 6

PAPER, INK, FAINT, GIVEN = (252, 251, 248), (28, 28, 32), (205, 203, 198), (214, 90, 20)
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
    frames: Sequence[Image.Image], story: Story, *, given: Collection[int] = frozenset()
) -> Image.Image:
    """A page of numbered frames with the story's events as coloured bars under the frames they cover.

    given are the numbers (from 1) of frames that were not generated; they are framed and labelled.
    An event that goes on in the next row of frames is drawn there again.
    """
    grid = _Grid(*_shown_size(frames[0].size))
    num_columns = ceil(len(frames) / ceil(len(frames) / grid.columns_of(PAGE_WIDTH_PX)))
    rows = range(0, len(frames), num_columns)  # index of the first frame of each row
    heading, font = ImageFont.load_default(17), ImageFont.load_default(14)
    title = _title(story, heading, font, grid.span(0, num_columns - 1))
    bars = [_lay_out_bars(story.events, row, num_columns, len(frames), grid, font) for row in rows]
    picture_height = _line_height(font) + PADDING_PX + grid.cell_height + GAP_PX
    row_heights = [picture_height + max((b.top + b.height for b in row_bars), default=0) for row_bars in bars]
    title_height = sum(_line_height(line_font) for _, line_font in title) + (GAP_PX if title else 0)
    height = 2 * MARGIN_PX + title_height + sum(row_heights) + GAP_PX * (len(rows) - 1)

    page = Image.new("RGB", (2 * MARGIN_PX + grid.span(0, num_columns - 1), height), PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN_PX
    for line, line_font in title:
        draw.text((MARGIN_PX, y), line, INK, line_font)
        y += _line_height(line_font)
    y = MARGIN_PX + title_height
    for row, row_bars, row_height in zip(rows, bars, row_heights):
        for column, frame in enumerate(frames[row : row + num_columns]):
            number = row + column + 1
            _draw_frame(page, (grid.left(column), y), frame, number, number in given, grid, font)
        for bar in row_bars:
            _draw_bar(draw, bar, y + picture_height + bar.top, grid, font)
        y += row_height + GAP_PX
    return page


def draw_comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Labelled rows of frames under one another, frame n below frame n, to compare versions of one story."""
    grid = _Grid(*_shown_size(rows[0][1][0].size))
    font = ImageFont.load_default(16)
    label_height = _line_height(font) + PADDING_PX
    row_height = label_height + grid.cell_height + GAP_PX
    last_column = max(len(frames) for _, frames in rows) - 1
    size = (2 * MARGIN_PX + grid.span(0, last_column), 2 * MARGIN_PX + len(rows) * row_height - GAP_PX)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for row, (label, frames) in enumerate(rows):
        y = MARGIN_PX + row * row_height
        draw.text((MARGIN_PX, y), label, INK, font)
        for column, frame in enumerate(frames):
            page.paste(_resized(frame, grid), (grid.left(column), y + label_height))
    return page


@dataclass(frozen=True)
class _Grid:
    """Columns of frames, all drawn in one size."""

    cell_width: int
    cell_height: int

    def left(self, column: int) -> int:
        return MARGIN_PX + column * (self.cell_width + GAP_PX)

    def span(self, first_column: int, last_column: int) -> int:
        """Pixels from the left edge of one column to the right edge of another."""
        return (last_column - first_column + 1) * (self.cell_width + GAP_PX) - GAP_PX

    def columns_of(self, page_width: int) -> int:
        return max(1, (page_width - 2 * MARGIN_PX + GAP_PX) // (self.cell_width + GAP_PX))


@dataclass(frozen=True)
class _Bar:
    """One event under one row of frames; top counts from the upper edge of the row's bars."""

    event_index: int
    first_column: int
    last_column: int
    top: int
    height: int
    lines: list[str]


def _title(
    story: Story, heading: ImageFont.FreeTypeFont, font: ImageFont.FreeTypeFont, width: int
) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    lines = []
    if story.subjects:
        lines += [(line, heading) for line in _wrap("Subjects: " + "; ".join(story.subjects), heading, width)]
    if story.style:
        lines += [(line, font) for line in _wrap("Style: " + story.style, font, width)]
    return lines


def _lay_out_bars(
    events: list[Event],
    row: int,
    num_columns: int,
    num_frames: int,
    grid: _Grid,
    font: ImageFont.FreeTypeFont,
) -> list[_Bar]:
    """A bar per event that touches this row of frames, below all earlier bars that share a column with it."""
    bars: list[_Bar] = []
    for index, event in enumerate(events):
        first = max(event.first_frame - 1 - row, 0)
        last = min(event.last_frame - 1 - row, num_columns - 1, num_frames - 1 - row)
        if first > last:
            continue
        numbers = f"{event.first_frame}"
        if event.last_frame > event.first_frame:
            numbers += f"-{event.last_frame}"
        lines = _wrap(f"[{numbers}] {event.description}", font, grid.span(first, last) - 2 * PADDING_PX)
        above = [bar for bar in bars if bar.first_column <= last and first <= bar.last_column]
        top = max((bar.top + bar.height + PADDING_PX // 2 for bar in above), default=0)
        bars.append(_Bar(index, first, last, top, len(lines) * _line_height(font) + PADDING_PX, lines))
    return bars


def _draw_bar(
    draw: ImageDraw.ImageDraw, bar: _Bar, y: int, grid: _Grid, font: ImageFont.FreeTypeFont
) -> None:
    x = grid.left(bar.first_column)
    right = x + grid.span(bar.first_column, bar.last_column) - 1
    colour = EVENT_COLOURS[bar.event_index % len(EVENT_COLOURS)]
    draw.rounded_rectangle((x, y, right, y + bar.height - 1), radius=5, fill=colour)
    for index, line in enumerate(bar.lines):
        draw.text((x + PADDING_PX, y + PADDING_PX // 2 + index * _line_height(font)), line, INK, font)


def _draw_frame(
    page: Image.Image,
    corner: tuple[int, int],
    frame: Image.Image,
    number: int,
    is_given: bool,
    grid: _Grid,
    font: ImageFont.FreeTypeFont,
) -> None:
    x, y = corner
    draw = ImageDraw.Draw(page)
    draw.text((x, y), f"{number}  given" if is_given else f"{number}", GIVEN if is_given else INK, font)
    y += _line_height(font) + PADDING_PX
    width = BORDER_PX if is_given else 1
    outline = (x - width, y - width, x + grid.cell_width + width - 1, y + grid.cell_height + width - 1)
    draw.rectangle(outline, outline=GIVEN if is_given else FAINT, width=width)
    page.paste(_resized(frame, grid), (x, y))


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size that a frame of this size is drawn at."""
    width, height = size
    if max(size) < MIN_FRAME_PX:
        factor = ceil(MIN_FRAME_PX / max(size))
        return width * factor, height * factor
    scale = min(1, MAX_FRAME_PX / max(size))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(frame: Image.Image, grid: _Grid) -> Image.Image:
    resampling = Image.Resampling.NEAREST if grid.cell_width > frame.width else Image.Resampling.LANCZOS
    return frame.convert("RGB").resize((grid.cell_width, grid.cell_height), resampling)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return sum(font.getmetrics()) + 2


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Greedy lines of at most width pixels; a word longer than a line is broken."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            fitting = sum(font.getlength(word[:end]) <= width for end in range(1, len(word)))
            lines.append(word[: max(1, fitting)])
            word = word[max(1, fitting) :]
        line = word
    return [*lines, line] if line else lines

"""A story as a comic page: panels of several sizes in rows, captions in boxes, a title.

No frame is cropped: panels have the frames' shape, and rows differ in how many they hold. Every event is told
once, above the first of its frames.

Legend: W width of a row, frames are numbered from 1, all sizes in pixels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

from PIL import Image, ImageDraw

from storyanchors.contact_sheet import INK, resized, texts_of
from storyanchors.lettering import Lettering, warn_of_missing_letters
from storyanchors.story import Story

SMALL_FRAME_PX = 128
MARGIN_PX, GUTTER_PX = 34, 16
LINE_PX = 3  # around panels
OVERLAP_PX = 12  # of a caption's box and the picture below it
INSET_PX, PADDING_PX = 12, 8  # of a caption: its box in the panel, its text in the box
MAX_CAPTION_LINES = 9
MAX_TITLE_SUBJECTS = 3
TITLE_PX = (38, 33, 28)  # the largest that needs one line
PAPER, CAPTION, SOFT = (255, 255, 255), (255, 243, 191), (104, 102, 96)
# How a row is filled: so many panels side by side, or a large one beside two small ones
LAYOUTS = ("1", "2", "3", "4", "5", "large first", "large last")
TALLEST, LOWEST = 0.62, 0.2  # of a panel, in widths of the page


@dataclass(frozen=True)
class _Panel:
    """One frame's place: its picture, and the box of the events that begin with it."""

    number: int
    left: int
    top: int  # of the picture
    width: int
    height: int
    caption: list[str]  # lines
    caption_width: int


@dataclass(frozen=True)
class _Texts:
    """What is told where: the descriptions of the events that begin with a frame, and the letters for it."""

    beginning: dict[int, list[str]]
    lettering: Lettering

    def lines(self, number: int, width: int) -> list[str]:
        """A frame's caption in a box that is at most so wide, with its border and padding."""
        inside = width - 2 * PADDING_PX
        lines = [
            line for text in self.beginning.get(number, []) for line in self.lettering.wrap(text, inside)
        ]
        return lines if len(lines) <= MAX_CAPTION_LINES else [*lines[: MAX_CAPTION_LINES - 1], "..."]

    def height(self, lines: list[str]) -> int:
        """Of a caption's box; 0 without one."""
        return len(lines) * self.lettering.line_height + 2 * PADDING_PX if lines else 0

    def room(self, number: int, width: int) -> int:
        """What a caption needs above its picture."""
        return max(0, self.height(self.lines(number, width)) - OVERLAP_PX)


def draw_comic_page(
    frames: Sequence[Image.Image], story: Story, *, title: str | None = None, font: str | Path | None = None
) -> Image.Image:
    """A page of all frames in reading order; where no title is given, the subjects make one."""
    title = story_title(story) if title is None else title
    warn_of_missing_letters([title, *texts_of(story)], font)
    small = max(frames[0].size) <= SMALL_FRAME_PX
    width = (960 if small else 1320) - 2 * MARGIN_PX
    texts = _Texts(_beginnings(story), Lettering(17, texts_of(story), font=font))
    heading = _heading(title, story.style, width, font)
    y = MARGIN_PX + sum(lettering.line_height for _, lettering, _ in heading) + GUTTER_PX
    panels: list[_Panel] = []
    for first, layout in choose_rows(len(frames), frames[0].width / frames[0].height, set(texts.beginning)):
        row = _lay_out_row(first, layout, y, width, frames[0].size, texts)
        panels += row
        y = max(panel.top + panel.height for panel in row) + GUTTER_PX

    page = Image.new("RGB", (width + 2 * MARGIN_PX, y - GUTTER_PX + MARGIN_PX), PAPER)
    y = MARGIN_PX - 8
    for line, lettering, colour in heading:
        lettering.draw_lines(page, (MARGIN_PX, y), [line], colour, width)
        y += lettering.line_height
    number_lettering = Lettering(13)
    for panel in panels:
        _draw_panel(page, panel, frames[panel.number - 1], number_lettering)
    for panel in panels:
        if panel.caption:
            _draw_caption(page, panel, texts)
    return page


def story_title(story: Story) -> str:
    """A title in the story's own words: its first subjects, few words each; else its style or its length."""
    names = [name for subject in story.subjects[:MAX_TITLE_SUBJECTS] if (name := _few_words(subject))]
    text = " & ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
    text += ", ..." if len(story.subjects) > MAX_TITLE_SUBJECTS else ""
    text = text or _few_words(story.style) or f"a story in {story.num_frames} frames"
    return text[:1].upper() + text[1:]


def _few_words(text: str) -> str:
    """A description without what comes after a comma, a bracket, or a word like with or wearing."""
    short = re.split(r"[,;:(.\u3001\u3002\uff0c]| (?:with|wearing|wrapped|who|in|and) ", text, maxsplit=1)[0]
    return short.strip() if len(short) <= 40 else short[:38].rsplit(" ", 1)[0].strip() + "..."


def choose_rows(num_frames: int, aspect: float, beginnings: set[int]) -> list[tuple[int, str]]:
    """(first frame, layout) of every row, top to bottom: the cheapest way to deal the frames into rows.

    It costs to draw panels too tall or too low, to repeat a layout, to have many panels in a row, and to
    begin a row, or to show a frame large, within an event. aspect is width / height; beginnings are the first
    frames of events.
    """
    best: dict[tuple[int, str], tuple[float, list[tuple[int, str]]]] = {(1, ""): (0.0, [])}
    for first in range(1, num_frames + 1):
        for (_, previous), (cost, rows) in [item for item in best.items() if item[0][0] == first]:
            for layout in LAYOUTS:
                after = first + _num_panels(layout)
                if after > num_frames + 1:
                    continue
                new = cost + _row_cost(layout, previous, aspect)
                new += 0.5 * (_large_frame(first, layout) not in {None, *beginnings})
                new += 0.3 * (after <= num_frames and after not in beginnings)
                if new < best.get((after, layout), (inf,))[0]:
                    best[after, layout] = new, [*rows, (first, layout)]
    return min((value for (after, _), value in best.items() if after == num_frames + 1), key=lambda v: v[0])[
        1
    ]


def _num_panels(layout: str) -> int:
    return int(layout) if layout.isdecimal() else 3


def _large_frame(first: int, layout: str) -> int | None:
    return {"large first": first, "large last": first + 2}.get(layout)


def _row_cost(layout: str, previous: str, aspect: float) -> float:
    height = (
        1 / int(layout) if layout.isdecimal() else 0.66
    ) / aspect  # of its tallest panel, in page widths
    cost = 6 * max(0.0, height - TALLEST) + 6 * max(0.0, LOWEST - height)
    cost += {"1": 0.6, "2": 0.2, "3": 0.3, "4": 0.5, "5": 1.2}.get(layout, 0.0)
    again_large = layout.startswith("large") and previous.startswith("large")
    return cost + 0.8 * (layout == previous) + 0.2 * again_large + 0.4 * (previous == "" and layout in "345")


def _beginnings(story: Story) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for event in story.events:
        text = event.description[:1].upper() + event.description[1:]
        found.setdefault(event.first_frame, []).append(text)
    return found


def _heading(
    title: str, style: str, width: int, font: str | Path | None
) -> list[tuple[str, Lettering, tuple[int, int, int]]]:
    """Lines with their letters and colours."""
    sizes = [Lettering(size_px, [title], bold=True, font=font) for size_px in TITLE_PX]
    large = next((one for one in sizes if one.width(title) <= width), sizes[-1])
    small = Lettering(16, [style], font=font)
    lines = [(line, large, INK) for line in large.wrap(title, width, 2)]
    return lines + [(line, small, SOFT) for line in small.wrap(style, width, 2)]


def _lay_out_row(
    first: int, layout: str, y: int, width: int, frame_size: tuple[int, int], texts: _Texts
) -> list[_Panel]:
    """Panels of a row whose highest caption or picture begins at y."""
    height_of = partial(_picture_height, frame_size)
    if layout.isdecimal():
        return _lay_out_side_by_side(first, int(layout), y, width, height_of, texts)
    return _lay_out_large_and_small(first, layout == "large first", y, width, height_of, texts)


def _picture_height(frame_size: tuple[int, int], width: int) -> int:
    return max(1, round(width * frame_size[1] / frame_size[0]))


def _lay_out_side_by_side(
    first: int, count: int, y: int, width: int, height_of: Callable[[int], int], texts: _Texts
) -> list[_Panel]:
    """Equal panels; a caption is as wide as the panels up to the next one that has a caption."""
    tallest = round(1.2 * TALLEST * width)
    one = (width - (count - 1) * GUTTER_PX) // count
    if height_of(one) > tallest:
        one = round(one * tallest / height_of(one))
    left = MARGIN_PX + (width - count * one - (count - 1) * GUTTER_PX) // 2
    numbers = range(first, first + count)
    spans = []
    for number in numbers:
        end = next((n for n in range(number + 1, first + count) if n in texts.beginning), first + count)
        spans.append((end - number) * (one + GUTTER_PX) - GUTTER_PX - 2 * INSET_PX)
    top = y + max(texts.room(number, span) for number, span in zip(numbers, spans))
    return [
        _Panel(
            number, left + i * (one + GUTTER_PX), top, one, height_of(one), texts.lines(number, span), span
        )
        for i, (number, span) in enumerate(zip(numbers, spans))
    ]


def _lay_out_large_and_small(
    first: int, large_first: bool, y: int, width: int, height_of: Callable[[int], int], texts: _Texts
) -> list[_Panel]:
    """A large panel beside two small ones under one another; the widths are such that both end together."""
    numbers = (first, first + 1, first + 2) if large_first else (first + 2, first, first + 1)

    def heights(large: int) -> tuple[int, int]:
        small = width - GUTTER_PX - large
        rooms = [texts.room(n, w - 2 * INSET_PX) for n, w in zip(numbers, (large, small, small))]
        return rooms[0] + height_of(large), rooms[1] + rooms[2] + 2 * height_of(small) + GUTTER_PX

    large = _where_crossed(lambda one: heights(one)[0] - heights(one)[1], width // 2, width * 4 // 5)
    small = width - GUTTER_PX - large
    bottom = y + max(heights(large))
    lefts = (
        (MARGIN_PX, MARGIN_PX + large + GUTTER_PX)
        if large_first
        else (MARGIN_PX + small + GUTTER_PX, MARGIN_PX)
    )
    places = [
        (numbers[0], lefts[0], bottom - height_of(large), large),
        (numbers[1], lefts[1], y + texts.room(numbers[1], small - 2 * INSET_PX), small),
        (numbers[2], lefts[1], bottom - height_of(small), small),
    ]
    return sorted(
        (
            _Panel(n, left, top, w, height_of(w), texts.lines(n, w - 2 * INSET_PX), w - 2 * INSET_PX)
            for n, left, top, w in places
        ),
        key=lambda panel: panel.number,
    )


def _where_crossed(rising: Callable[[int], int], low: int, high: int) -> int:
    """About where a function that rises passes 0."""
    while high - low > 2:
        middle = (low + high) // 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return low


def _draw_panel(page: Image.Image, panel: _Panel, frame: Image.Image, small: Lettering) -> None:
    draw = ImageDraw.Draw(page)
    right, bottom = panel.left + panel.width - 1, panel.top + panel.height - 1
    page.paste(resized(frame, (panel.width, panel.height)), (panel.left, panel.top))
    box = (panel.left - LINE_PX, panel.top - LINE_PX, right + LINE_PX, bottom + LINE_PX)
    draw.rectangle(box, outline=INK, width=LINE_PX)
    tag = round(small.width(str(panel.number))) + 10
    draw.rectangle((right - tag + 1, bottom - small.line_height + 1, right, bottom), fill=PAPER)
    small.draw(page, (right - tag + 6, bottom - small.line_height + 2), str(panel.number), INK)


def _draw_caption(page: Image.Image, panel: _Panel, texts: _Texts) -> None:
    """A box as wide as its longest line, over the upper edge of its picture."""
    text_width = round(max(map(texts.lettering.width, panel.caption)))
    left, bottom = panel.left + INSET_PX, panel.top + OVERLAP_PX
    top = bottom - texts.height(panel.caption)
    box = (left, top, left + text_width + 2 * PADDING_PX, bottom)
    ImageDraw.Draw(page).rectangle(box, fill=CAPTION, outline=INK, width=2)
    texts.lettering.draw_lines(page, (left + PADDING_PX, top + PADDING_PX), panel.caption, INK, text_width)

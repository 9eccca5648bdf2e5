"""Two versions of a story above one another: frames that are the same stand back, changed ones are framed."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw

from infer.frame_folder import read_frame
from infer.page_parts import enlargeable, html_page, is_small, mark, picture
from infer.shown_story import ShownStory
from infer.story_difference import FramePair, count_pairs
from storyanchors.comic_page import story_title
from storyanchors.contact_sheet import (
    FAINT,
    GAP_PX,
    INK,
    MARGIN_PX,
    PADDING_PX,
    PAPER,
    resized,
    shown_size,
    texts_of,
)
from storyanchors.lettering import Lettering, warn_of_missing_letters
from storyanchors.markup import Html, element
from storyanchors.story import Story

PAGE_WIDTH_PX = 1320
MAX_COLUMNS = 6
CHANGED, SOFT = (44, 122, 58), (128, 126, 120)
MAX_TEXT_LINES = 6


def draw_story_comparison(
    a: ShownStory,
    b: ShownStory,
    frames_a: Sequence[Image.Image],
    frames_b: Sequence[Image.Image],
    pairs: Sequence[FramePair],
    *,
    font: str | Path | None = None,
) -> Image.Image:
    """A column per pair, a above b; under a pair whose text changed, what is told of it in b."""
    texts = [*texts_of(a.story), *texts_of(b.story), _label("A", a), _label("B", b)]
    warn_of_missing_letters(texts, font)
    heading, small = (Lettering(size_px, texts, font=font) for size_px in (20, 14))
    width, height = shown_size(frames_a[0].size)
    columns = max(1, min(len(pairs), (PAGE_WIDTH_PX - 2 * MARGIN_PX + GAP_PX) // (width + GAP_PX)))
    columns = ceil(len(pairs) / ceil(len(pairs) / columns))
    line = small.line_height
    rows = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        told = [small.wrap(_new_text(a.story, b.story, pair), width, MAX_TEXT_LINES) for pair in row]
        rows.append((row, told, 2 * (height + line + PADDING_PX) + max(map(len, told)) * line + 3 * GAP_PX))
    head_height = 3 * heading.line_height + GAP_PX
    page_width = 2 * MARGIN_PX + max(columns * (width + GAP_PX) - GAP_PX, 480)
    page = Image.new("RGB", (page_width, 2 * MARGIN_PX + head_height + sum(row[2] for row in rows)), PAPER)
    for index, text in enumerate((_label("A, above:", a), _label("B, below:", b), count_pairs(pairs))):
        text = "".join(heading.wrap(text, page_width - 2 * MARGIN_PX, 1))
        heading.draw(
            page, (MARGIN_PX, MARGIN_PX + index * heading.line_height), text, SOFT if index == 2 else INK
        )
    y = MARGIN_PX + head_height
    for row, told, row_height in rows:
        for column, (pair, lines) in enumerate(zip(row, told)):
            x = MARGIN_PX + column * (width + GAP_PX)
            _draw_one(page, (x, y), pair.a, frames_a, "A", pair, (width, height), small)
            below = y + height + line + PADDING_PX + GAP_PX
            _draw_one(page, (x, below), pair.b, frames_b, "B", pair, (width, height), small)
            small.draw_lines(page, (x, below + height + line + PADDING_PX), lines, INK, width)
        y += row_height
    return page


def _label(letter: str, shown: ShownStory) -> str:
    version = (
        "" if shown.version is None else f", version {shown.version}: {shown.history[shown.version - 1].what}"
    )
    return f"{letter} {shown.name}{version}"


def _draw_one(
    page: Image.Image,
    corner: tuple[int, int],
    number: int | None,
    frames: Sequence[Image.Image],
    letter: str,
    pair: FramePair,
    size: tuple[int, int],
    small: Lettering,
) -> None:
    """One frame below its number, pale where the other version has the same; an empty place for none."""
    x, y = corner
    colour = SOFT if pair.same else CHANGED
    text = f"{letter}{number}  {pair.word}" if number else f"{letter} has none"
    small.draw(page, corner, text, SOFT if number is None else colour)
    y += small.line_height + PADDING_PX // 2
    box = (x, y, x + size[0] - 1, y + size[1] - 1)
    if number is None:
        ImageDraw.Draw(page).rectangle(box, outline=FAINT, width=2)
        return
    picture = resized(frames[number - 1], size)
    page.paste(Image.blend(picture, Image.new("RGB", size, PAPER), 0.5) if pair.same else picture, (x, y))
    if not pair.same:
        ImageDraw.Draw(page).rectangle(
            (box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), outline=CHANGED, width=3
        )


def _told(story: Story, number: int | None) -> str:
    return "; ".join(story.descriptions()[number - 1]) if number else ""


def _new_text(a: Story, b: Story, pair: FramePair) -> str:
    """What b tells of a pair where a tells something else."""
    text = _told(b, pair.b)
    return text if text != _told(a, pair.a) else ""


def comparison_page(a: ShownStory, b: ShownStory, pairs: Sequence[FramePair]) -> str:
    """The same as one offline HTML page: a click shows both frames of a pair, large, side by side."""
    columns = ceil(len(pairs) / ceil(len(pairs) / MAX_COLUMNS))
    style = f"grid-template-columns: repeat({columns}, minmax(120px, 1fr))"
    cells = [_cell(a, b, pair, place, len(pairs)) for place, pair in enumerate(pairs, start=1)]
    about = [_label("A, above:", a), _label("B, below:", b), count_pairs(pairs)]
    return html_page(story_title(b.story), about, [element("section", *cells, class_="sheet", style=style)])


def _cell(a: ShownStory, b: ShownStory, pair: FramePair, place: int, num_places: int) -> Html:
    old, new = _told(a.story, pair.a), _told(b.story, pair.b)
    there = (b.paths if pair.b else a.paths)[(pair.b or pair.a) - 1]
    shape = "{} / {}".format(*read_frame(there).size)
    pictures = [_picture(shown, number, shape) for shown, number in ((a, pair.a), (b, pair.b))]
    names = [f"{letter}{number}" for letter, number in (("A", pair.a), ("B", pair.b)) if number]
    caption = [element("b", " ".join(names)), mark(pair.word, "same" if pair.same else "changed")]
    texts = [element("del", old, dir="auto"), element("ins", new, dir="auto")] if old != new else []
    kind = "same" if pair.same else "changed"
    small = ["small"] * is_small(there)
    told = [] if texts else [new]
    cell = enlargeable(place, num_places, pictures, caption, told, " ".join([*small, kind]))
    return element("div", cell, *(element("p", text, class_="told") for text in texts))


def _picture(shown: ShownStory, number: int | None, shape: str) -> Html:
    if number is None:
        return element("span", "none", class_="missing", style=f"--shape: {shape}")
    return picture(shown.paths[number - 1], f"frame {number}: {_told(shown.story, number)}")

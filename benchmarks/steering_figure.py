"""One picture of what steering.py asked and got: a held-out story of some tasks, before and after.

It is the first story whose whole cast the text names or the kept frames show. Orange: kept frames. Green:
drawn frames. A red corner: a drawn frame that shows another fact than asked for.
"""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.steering_cases import Case
from benchmarks.steering_tasks import SECTIONS, TASKS
from storyanchors.story_world import members_seen, parse_frame, story_samples

SHOWN = (
    "continue_1_anonymous",
    "other_prompt",
    "infill",
    "edit_anonymous",
    "insert",
    "delete",
    "extend_anonymous",
)
FRAME_PX, GAP_PX, LABEL_PX, MARGIN_PX, BORDER_PX = 96, 10, 74, 16, 3
COLUMNS = 8
PAPER, INK, FAINT, BLANK = (252, 251, 248), (28, 28, 32), (110, 108, 104), (232, 230, 226)
KEPT, DRAWN, WRONG = (214, 90, 20), (40, 140, 70), (210, 20, 30)
WIDTH_PX = 2 * MARGIN_PX + LABEL_PX + COLUMNS * (FRAME_PX + GAP_PX)
LINE_LETTERS = 170

Cell = tuple[Image.Image | None, tuple[int, int, int] | None, bool]  # picture, border, wrong


def draw_figure(out: Path, models: list[str]) -> Image.Image:
    """A block per task that all models have drawn: what was asked, the frames before, each model's after."""
    blocks = []
    for task in SHOWN:
        index, case = next(
            (index, case) for index, case in enumerate(TASKS[task].cases(50)) if _all_known(case)
        )
        strips = {model: out / model / task / f"{index}.png" for model in models}
        if all(path.is_file() for path in strips.values()):
            rows = [("before", _before(case))]
            rows += [(model, _after(case, _frames(path))) for model, path in strips.items()]
            blocks.append((_title(task), _asked(case), rows))
    height = 2 * MARGIN_PX + sum(map(_height, blocks))
    page = Image.new("RGB", (WIDTH_PX, height), PAPER)
    y = MARGIN_PX
    for block in blocks:
        _draw_block(page, y, *block)
        y += _height(block)
    return page


def _all_known(case: Case) -> bool:
    everybody = set(range(len(case.truth.cast)))
    return case.members == everybody or members_seen(case.truth, case.edit.kept) == everybody


def _title(task: str) -> str:
    [section] = [name for name, tasks in SECTIONS.items() if TASKS[task] in tasks]
    return f"{section}: {TASKS[task].what}"


def _asked(case: Case) -> list[str]:
    """The texts of the events that the drawn frames belong to, as many as fit in three lines."""
    drawn = set(case.edit.drawn())
    events = []
    for event in case.edit.story.events:
        numbers = range(event.first_frame, event.last_frame + 1)
        if drawn & set(numbers):
            events.append(
                f"[{'-'.join(str(n) for n in sorted({numbers[0], numbers[-1]}))}] {event.description}"
            )
    return textwrap.wrap("  ".join(events), LINE_LETTERS, max_lines=3, placeholder=" ...")


def _before(case: Case) -> list[Cell]:
    """All frames before a change of the story; where it stays the same, those that are given."""
    kept = set(case.edit.kept.values())
    if case.before != case.edit.story:
        return [(frame, KEPT if n in kept else None, False) for n, frame in enumerate(case.frames, start=1)]
    return [
        (frame, KEPT, False) if n in kept else (None, None, False) for n, frame in enumerate(case.frames, 1)
    ]


def _after(case: Case, frames: list[Image.Image]) -> list[Cell]:
    parsed = [parse_frame(frame) for frame in frames]
    cells: list[Cell] = []
    for number, frame in enumerate(frames, start=1):
        others = set(range(1, len(frames) + 1)) - {number}
        wrong = number not in case.given and story_samples(parsed, case.truth, others)["pfa_f1"] != [1.0]
        cells.append((frame, KEPT if number in case.given else DRAWN, wrong))
    return cells


def _frames(strip: Path) -> list[Image.Image]:
    with Image.open(strip) as image:
        side = image.height
        return [image.crop((x, 0, x + side, side)) for x in range(0, image.width, side)]


def _row_height(cells: list[Cell]) -> int:
    return -(-len(cells) // COLUMNS) * (FRAME_PX + GAP_PX)


def _height(block: tuple[str, list[str], list[tuple[str, list[Cell]]]]) -> int:
    _, asked, rows = block
    return 24 + 15 * len(asked) + 6 + sum(_row_height(cells) for _, cells in rows) + 14


def _draw_block(
    page: Image.Image, y: int, title: str, asked: list[str], rows: list[tuple[str, list[Cell]]]
) -> None:
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN_PX, y), title, INK, ImageFont.load_default(16))
    y += 24
    for line in asked:
        draw.text((MARGIN_PX, y), line, FAINT, ImageFont.load_default(11))
        y += 15
    y += 6
    for label, cells in rows:
        draw.text((MARGIN_PX, y + FRAME_PX // 2 - 8), label, INK, ImageFont.load_default(13))
        for index, cell in enumerate(cells):
            row, column = divmod(index, COLUMNS)
            x = MARGIN_PX + LABEL_PX + column * (FRAME_PX + GAP_PX)
            _draw_cell(page, x, y + row * (FRAME_PX + GAP_PX), *cell)
        y += _row_height(cells)


def _draw_cell(
    page: Image.Image,
    x: int,
    y: int,
    frame: Image.Image | None,
    border: tuple[int, int, int] | None,
    wrong: bool,
) -> None:
    draw = ImageDraw.Draw(page)
    if border:
        edge = (x - BORDER_PX, y - BORDER_PX, x + FRAME_PX + BORDER_PX - 1, y + FRAME_PX + BORDER_PX - 1)
        draw.rectangle(edge, fill=border)
    if frame is None:
        draw.rectangle((x, y, x + FRAME_PX - 1, y + FRAME_PX - 1), fill=BLANK)
    else:
        page.paste(frame.convert("RGB").resize((FRAME_PX, FRAME_PX), Image.Resampling.LANCZOS), (x, y))
    if wrong:
        right = x + FRAME_PX + BORDER_PX - 1
        draw.polygon(
            [(right - 20, y - BORDER_PX), (right, y - BORDER_PX), (right, y - BORDER_PX + 20)], fill=WRONG
        )

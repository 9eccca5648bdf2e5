"""A story as one offline HTML page: frames over their events, what is given or locked, its history."""

from math import ceil
from pathlib import Path

from infer.page_parts import (
    css_colour,
    enlargeable,
    html_page,
    is_small,
    mark,
    picture,
    thumbnail,
)
from infer.project.history import Version
from infer.project.pictures import picture_path
from infer.shown_story import ShownStory
from storyanchors.comic_page import story_title
from storyanchors.contact_sheet import range_of
from storyanchors.markup import Html, element
from storyanchors.story import Event

MAX_COLUMNS, MIN_COLUMN_PX = 5, 120
MAX_THUMBNAILS = 12  # of one version


def story_page(shown: ShownStory, folder: Path | None, title: str | None = None) -> str:
    """The page; folder is that of the project that the story's history belongs to."""
    body = _sheets(shown)
    if shown.history and folder is not None:
        body += [element("h2", "How it was made"), _history(shown, folder)]
    prompt = element("pre", shown.story.prompt(), dir="auto")
    body += [
        element("h2", "Prompt"),
        element("details", element("summary", "the text the model was told"), prompt),
    ]
    return html_page(title or story_title(shown.story), [shown.story.style, _facts(shown)], body)


def _facts(shown: ShownStory) -> str:
    facts = [f"{shown.story.num_frames} frames", f"{len(shown.story.events)} events"]
    if shown.version is not None:
        facts.append(f"version {shown.version} of {len(shown.history)}")
    if shown.given:
        facts.append(f"{len(shown.given)} given")
    if shown.locked:
        facts.append(f"{len(shown.locked)} locked")
    return " \u00b7 ".join([*facts, shown.name])


def _sheets(shown: ShownStory) -> list[Html]:
    """Rows of frames, under each the events that touch it."""
    num_frames = len(shown.paths)
    num_columns = ceil(num_frames / ceil(num_frames / MAX_COLUMNS))
    small, sheets = is_small(shown.paths[0]), []
    for row in range(0, num_frames, num_columns):
        numbers = range(row + 1, min(row + num_columns, num_frames) + 1)
        cells = [_frame(shown, number, small) for number in numbers] + _bars(shown.story.events, numbers)
        columns = f"grid-template-columns: repeat({num_columns}, minmax({MIN_COLUMN_PX}px, 1fr))"
        sheets.append(element("section", *cells, class_="sheet", style=columns))
    return sheets


def _frame(shown: ShownStory, number: int, small: bool) -> Html:
    kinds = ["given"] * (number in shown.given) + ["locked"] * (number in shown.locked)
    caption = [element("b", str(number)), *(mark(kind, kind) for kind in kinds)]
    origin = shown.origins.get(number)
    if origin and number not in shown.given:
        seed = "" if origin.seed is None else f", seed {origin.seed}"
        caption.append(mark(f"version {origin.number}{seed}"))
    told = [e.description for e in shown.story.events if e.first_frame <= number <= e.last_frame]
    image = picture(shown.paths[number - 1], f"frame {number}: {'; '.join(told)}")
    kind = " ".join(["small"] * small + kinds)
    return enlargeable(number, len(shown.paths), [image], caption, told, kind)


def _bars(events: list[Event], numbers: range) -> list[Html]:
    """The events of a row of frames, each below all earlier ones that share a frame with it."""
    here = [
        (i, e) for i, e in enumerate(events) if e.first_frame <= numbers[-1] and numbers[0] <= e.last_frame
    ]
    lanes: dict[int, int] = {}
    for index, event in here:
        taken = {
            lanes[i]
            for i, e in here
            if i in lanes and e.first_frame <= event.last_frame and event.first_frame <= e.last_frame
        }
        lanes[index] = min(set(range(len(here) + 1)) - taken)
    bars = []
    for index, event in here:
        first = max(event.first_frame, numbers[0]) - numbers[0] + 1
        after = min(event.last_frame, numbers[-1]) - numbers[0] + 2
        area = f"grid-area: {lanes[index] + 2} / {first} / {lanes[index] + 3} / {after}"
        style = f"{area}; background: {css_colour(index)}"
        text = element("span", event.description, dir="auto")
        bars.append(element("div", element("b", f"[{range_of(event)}] "), text, class_="bar", style=style))
    return bars


def _history(shown: ShownStory, folder: Path) -> Html:
    """A row per version, the first one first; those that did not lead to the shown one stand back."""
    ancestors, number = set(), shown.version
    while number is not None:
        ancestors.add(number)
        number = shown.history[number - 1].parent
    head = element("tr", *(element("th", text) for text in ("version", "what", "new frames", "drawn with")))
    rows = [
        _version(version, version.number in ancestors, shown.version, folder) for version in shown.history
    ]
    return element("table", head, *rows)


def _version(version: Version, is_ancestor: bool, present: int | None, folder: Path) -> Html:
    name = f"{version.number}" + (" (shown)" if version.number == present else "")
    parent = f"from {version.parent}" if version.parent else "the beginning"
    new = [number for number in range(1, len(version.frames) + 1) if number not in version.kept]
    images = [
        thumbnail(
            picture_path(folder, version.frames[number - 1]), f"frame {number} of version {version.number}"
        )
        for number in new[:MAX_THUMBNAILS]
    ]
    numbers = ", ".join(map(str, new)) or "none"
    return element(
        "tr",
        element("td", element("b", name), element("p", parent, class_="soft")),
        element("td", element("span", version.what, dir="auto"), element("p", version.time, class_="soft")),
        element("td", element("div", *images, class_="thumbnails"), element("span", numbers, class_="soft")),
        element("td", _settings(version), class_="settings"),
        class_="" if is_ancestor else "aside",
    )


def _settings(version: Version) -> str:
    parts = [] if version.seed is None else [f"seed {version.seed}"]
    parts += [f"{key} {value}" for key, value in version.settings.items() if value not in (None, "", [])]
    parts += [f"{key} {version.record[key]}" for key in ("dtype",) if key in version.record]
    parts += [f"weights {digest[:12]}" for digest in version.weights_sha256.values()]
    return ", ".join(parts) or "nothing was drawn"

"""The HTML of a review: tables and clips on one page that opens from a disk, without a server or scripts.

Everything that comes from videos, models or files is a plain str, and a plain str is escaped where it is put
into an element: nothing that a model writes becomes markup. The page may load nothing and run nothing.
"""

from dataclasses import dataclass, field
from html import escape

from data_pipeline.labeling.findings import Finding, PoolEvent
from storyanchors.contact_sheet import EVENT_COLOURS
from storyanchors.markup import Html, element, join
from storyanchors.story import Event, Story

# Browsers refuse whatever this does not allow, also where our escaping should have a hole
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
COLUMN_PX = 180  # of a frame, at most
POOL_COLOUR = (226, 224, 218)  # of an annotation that no event of the story names
STYLE = """
:root { color-scheme: light; --ink: #1c1c20; --faint: #cdcbc6; --soft: #66655f; --paper: #fcfbf8; }
body { margin: 24px auto; max-width: 1320px; padding: 0 20px; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
h3 { font-size: 15px; margin: 0; } h4 { font-size: 13px; margin: 12px 0 3px; color: var(--soft); }
p { margin: 4px 0; } .soft { color: var(--soft); } a { color: inherit; }
table { border-collapse: collapse; margin: 8px 0 16px; } caption { text-align: left; font-weight: 600; }
th, td { border-bottom: 1px solid var(--faint); padding: 3px 14px 3px 0; text-align: left; }
td.number { text-align: right; } th { font-weight: 600; vertical-align: bottom; } td { vertical-align: top; }
.tables { display: flex; flex-wrap: wrap; align-items: start; gap: 0 48px; }
article { border-top: 2px solid var(--ink); margin: 18px 0 28px; padding-top: 8px;
  content-visibility: auto; contain-intrinsic-size: auto 700px; }
.status { border-radius: 4px; padding: 0 7px; margin-left: 8px; font-size: 12px; font-weight: 600; }
.ok, .info { background: #d5ead0; } .warned, .warning { background: #fae3ae; }
.quarantined, .blocked, .error { background: #f3c0c1; } .none { background: var(--faint); }
.sheet { display: grid; gap: 3px 6px; margin: 8px 0 12px; }
figure { margin: 0; } figcaption { font-size: 12px; white-space: nowrap; overflow: hidden; }
img { width: 100%; display: block; outline: 1px solid var(--faint); }
.small img { image-rendering: pixelated; }
.stands { font-size: 11px; color: var(--soft); }
.bar { border-radius: 4px; padding: 1px 5px; font-size: 12px; line-height: 1.3; overflow: hidden;
  max-height: 3.9em; min-width: 0; }
.annotation { font-size: 11px; max-height: 1.3em; border: 1px solid rgb(0 0 0 / 0.18); }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 32px; }
ol, ul { margin: 2px 0; padding-left: 1.4em; } .events { list-style: none; padding: 0; }
.events li { display: grid; grid-template-columns: 14px 7.2em 1fr; gap: 8px; margin: 2px 0; }
.chip { border-radius: 3px; height: 14px; margin-top: 3px; border: 1px solid rgb(0 0 0 / 0.18); }
.findings { list-style: none; padding: 0; } .findings li { margin: 2px 0; }
.findings .status { margin: 0 6px 0 0; font-weight: 400; }
pre { white-space: pre-wrap; background: #f1efe9; padding: 8px; margin: 4px 0; font-size: 12px; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row says what it is."""

    title: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Thumbnail:
    """A story frame to look at: a JPEG in base64; small ones are enlarged by whole pixels."""

    base64: str
    small: bool


@dataclass(frozen=True)
class StageOutcome:
    """What became of a clip in one stage, and what that cost."""

    stage: str
    status: str
    findings: list[Finding]
    num_requests: int
    tokens: int
    usd: float


@dataclass(frozen=True)
class RawAnswer:
    """One line of the ledger, for a clip that something is wrong with."""

    request: str
    status: str
    finish: str
    text: str


@dataclass(frozen=True)
class ReviewedClip:
    """All that is shown of a clip. event_ids: per event of the story the annotations that it is made of."""

    key: str
    facts: str
    thumbnails: list[Thumbnail]
    rows: list[tuple[int, int]]  # first and last frame of each row of the sheet
    outcomes: list[StageOutcome]
    global_caption: str = ""
    pool: list[PoolEvent] = field(default_factory=list)
    story: Story | None = None
    event_ids: list[list[str]] = field(default_factory=list)
    answers: list[RawAnswer] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A heading, a line about it, and clips; `elsewhere` are keys of clips shown in an earlier section."""

    title: str
    about: str
    clips: list[ReviewedClip]
    elsewhere: list[str] = field(default_factory=list)


def review_page(title: str, facts: list[str], tables: list[Table], sections: list[Section]) -> str:
    """The whole page: facts about the run, its tables, and sections of clips."""
    body = [element("h1", title), *(element("p", fact, class_="soft") for fact in facts)]
    body.append(element("h2", "The run"))
    body.append(element("div", *map(_table, tables), class_="tables"))
    for section in sections:
        body += [element("h2", section.title), element("p", section.about, class_="soft")]
        if section.elsewhere:
            links = [element("a", key, href=f"#{key}") for key in section.elsewhere]
            body.append(element("p", "Shown above: ", join([Html(link + " ") for link in links])))
        body += map(_clip, section.clips)
    head = element("title", title) + Html(f"<style>{STYLE}</style>")
    policy = Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    start = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    return f"{start}{policy}{head}</head>\n<body>{join(body)}</body></html>\n"


def _table(table: Table) -> Html:
    head = element("tr", *(element("th", name) for name in table.head))
    rows = [element("tr", *map(_cell, row)) for row in table.rows]
    return element("table", element("caption", table.title), head, *rows)


def _cell(text: str) -> Html:
    return element("td", text, class_="number" if text[:1].isdigit() else "")


def _clip(clip: ReviewedClip) -> Html:
    badges = [_badge(f"{one.stage}: {one.status}", one.status) for one in clip.outcomes]
    parts = [element("h3", clip.key, *badges), element("p", clip.facts, class_="soft")]
    colours = [EVENT_COLOURS[number % len(EVENT_COLOURS)] for number in range(_num_events(clip))]
    parts += [_sheet(clip, first, last, colours) for first, last in clip.rows]
    if clip.global_caption:
        parts += [element("h4", "Global caption"), element("p", clip.global_caption)]
    parts.append(element("div", _annotations(clip, colours), _story(clip, colours), class_="columns"))
    if found := [(one.stage, finding) for one in clip.outcomes for finding in one.findings]:
        items = [element("li", _badge(f"{stage} {f.code}", f.severity), f.detail) for stage, f in found]
        parts += [element("h4", "Findings"), element("ul", *items, class_="findings")]
    parts += [element("h4", "Cost"), element("p", _cost(clip.outcomes))]
    for answer in clip.answers:
        summary = element("summary", f"Answer to {answer.request}: {answer.status}, {answer.finish}")
        parts.append(element("details", summary, element("pre", answer.text)))
    return element("article", *parts, id=clip.key)


def _sheet(clip: ReviewedClip, first: int, last: int, colours: list) -> Html:
    """A row of frames, under them the story's events and then the annotations, as bars over their frames."""
    stands: dict[int, list[str]] = {}
    for event in clip.pool:
        stands.setdefault(event.representative, []).append(event.id)
    cells = []
    for number in range(first, last + 1):
        thumbnail = clip.thumbnails[number - 1]
        image = Html(f'<img alt="frame {number}" src="data:image/jpeg;base64,{escape(thumbnail.base64)}">')
        marks = element("span", " " + " ".join(stands[number]), class_="stands") if number in stands else None
        caption = element("figcaption", str(number), marks)
        column = f"grid-area: 1 / {number - first + 1}"
        small = "small" if thumbnail.small else ""
        cells.append(element("figure", caption, image, class_=small, style=column))
    events = clip.story.events if clip.story else []
    story_bars = [
        (event.first_frame, event.last_frame, _numbered(number, event), event.description, colour)
        for number, (event, colour) in enumerate(zip(events, colours), start=1)
    ]
    pool_bars = [
        (event.first_frame, event.last_frame, event.id, event.description, _colour_of(event, clip, colours))
        for event in clip.pool
    ]
    grid_row = 2
    for kind, bars in (("event", story_bars), ("annotation", pool_bars)):
        here = [bar for bar in bars if bar[0] <= last and first <= bar[1]]
        lanes = _lanes([(bar[0], bar[1]) for bar in here])
        for (begin, end, label, text, colour), lane in zip(here, lanes):
            place = f"{max(begin, first) - first + 1} / {grid_row + lane + 1} / {min(end, last) - first + 2}"
            area = f"grid-area: {grid_row + lane} / {place}; background: {_css(colour)}"
            cells.append(
                element("div", f"{label} {text}", class_=f"bar {kind}", style=area, title=f"{label} {text}")
            )
        grid_row += max(lanes, default=-1) + 1
    columns = f"grid-template-columns: repeat({_most_columns(clip)}, minmax(0, {COLUMN_PX}px))"
    return element("div", *cells, class_="sheet", style=columns)


def _lanes(ranges: list[tuple[int, int]]) -> list[int]:
    """For every range the first lane in which nothing before it shares a frame with it."""
    lanes: list[int] = []
    for index, (first, last) in enumerate(ranges):
        taken = {lanes[i] for i, (begin, end) in enumerate(ranges[:index]) if begin <= last and first <= end}
        lanes.append(min(set(range(index + 1)) - taken))
    return lanes


def _annotations(clip: ReviewedClip, colours: list) -> Html:
    if not clip.pool:
        return element("div")
    items = [
        element(
            "li",
            element("span", class_="chip", style=f"background: {_css(_colour_of(event, clip, colours))}"),
            element("span", f"{event.id} {_frames(event)}"),
            element("span", event.description),
        )
        for event in clip.pool
    ]
    return element("div", element("h4", "Annotations (first stage)"), element("ul", *items, class_="events"))


def _story(clip: ReviewedClip, colours: list) -> Html:
    if clip.story is None:
        return element("div")
    items = []
    for number, (event, colour) in enumerate(zip(clip.story.events, colours), start=1):
        made_of = " ".join(clip.event_ids[number - 1]) if number <= len(clip.event_ids) else ""
        source = element("span", f" ({made_of})", class_="soft") if made_of else None
        items.append(
            element(
                "li",
                element("span", class_="chip", style=f"background: {_css(colour)}"),
                element("span", _numbered(number, event)),
                element("span", event.description, source),
            )
        )
    subjects = element("ol", *(element("li", subject) for subject in clip.story.subjects))
    return element(
        "div",
        *(element("h4", "Story (second stage)"), element("ul", *items, class_="events")),
        *((element("h4", "Subjects"), subjects) if clip.story.subjects else ()),
        *((element("h4", "Style"), element("p", clip.story.style)) if clip.story.style else ()),
    )


def _cost(outcomes: list[StageOutcome]) -> str:
    lines = [
        f"{one.stage} {one.num_requests} request{'s' * (one.num_requests != 1)}, {one.tokens:,} tokens, "
        f"{one.usd:.4f} USD"
        for one in outcomes
    ]
    return "; ".join(lines) + f"; together {sum(one.usd for one in outcomes):.4f} USD"


def _badge(text: str, kind: str) -> Html:
    return element("span", text, class_=f"status {kind}")


def _num_events(clip: ReviewedClip) -> int:
    return len(clip.story.events) if clip.story else 0


def _most_columns(clip: ReviewedClip) -> int:
    return max(last - first + 1 for first, last in clip.rows)


def _colour_of(event: PoolEvent, clip: ReviewedClip, colours: list) -> tuple[int, int, int]:
    """An annotation has the colour of the first event of the story that is made of it."""
    named = (colour for colour, ids in zip(colours, clip.event_ids) if event.id in ids)
    return next(named, POOL_COLOUR)


def _numbered(number: int, event: Event) -> str:
    return f"{number}. {_frames(event)}"


def _frames(event: Event | PoolEvent) -> str:
    first, last = event.first_frame, event.last_frame
    return f"[{first}]" if first == last else f"[{first}-{last}]"


def _css(colour: tuple[int, int, int]) -> str:
    return f"rgb({', '.join(map(str, colour))})"

"""What the page shows of a board at one moment: plain values, from which the HTML is written."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Card:
    """One frame. picture is a URL, or "" while there is none."""

    number: int
    text: str
    event: int  # index of the narrowest event around it, which says its colour
    numbers: str  # of that event: "3-5"
    picture: str = ""
    locked: bool = False
    drawing: bool = False


@dataclass(frozen=True)
class Variant:
    """One of several drawings of a frame."""

    label: str
    picture: str


@dataclass(frozen=True)
class Comparison:
    """Drawings of one frame to choose from; the first is the one that the story has now."""

    number: int
    variants: list[Variant]
    ready: bool


@dataclass(frozen=True)
class Progress:
    """What is being drawn, how far it is (0 to 1), and what waits behind it."""

    what: str
    share: float
    waiting: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BoardView:
    """The whole board."""

    name: str
    cards: list[Card]
    version: int = 0  # 0 = nothing is drawn yet
    num_versions: int = 0
    what: str = ""  # what made this version
    selected: int | None = None
    place: int | None = None  # frames are to be inserted after this one
    comparison: Comparison | None = None
    progress: Progress | None = None
    message: str = ""
    is_error: bool = False
    can_undo: bool = False
    can_redo: bool = False
    has_draft: bool = False  # of the story's text
    moving: bool = False  # frames may get other numbers: what names one waits
    story_world: bool = False  # the model knows nothing else

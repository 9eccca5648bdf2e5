"""What one page looks at. Every page has its own, so that a click means the frame that its own page shows."""

from dataclasses import dataclass


@dataclass
class Focus:
    """A frame, a place for new ones, or, with neither, the story; numbers are those after `moves` moves."""

    selected: int | None = None
    place: int | None = None  # new frames go after this one
    moves: int = 0  # how often the board's frames had been numbered anew

    def look_at(self, moves: int, *, selected: int | None = None, place: int | None = None) -> None:
        """Something else from now on."""
        self.selected, self.place, self.moves = selected, place, moves

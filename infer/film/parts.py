"""A film's frames on disk: a film that was stopped goes on, and one that was edited draws little anew.

gaps/<key>/ has the frames of one gap, 001.png on. The key hashes all that decides them: both anchors, what
the story tells of them, the model and its settings. So a gap is found again whatever its number is, after an
insertion too, and one whose anchor or text changed is not. frames/ has the whole film, 000000.png on, and
film.json, which says how it was made.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from infer.film.gap import Gap
from infer.frame_folder import as_png
from storyanchors.output_folder import output_folder

GAPS_FOLDER, FRAMES_FOLDER = "gaps", "frames"
GAP_FILE, FILM_FILE = "gap.json", "film.json"


class FilmParts:
    """The folder of one film; settings are those that decide the pixels, by name."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings = folder, settings

    def find_gap(self, gap: Gap) -> list[Path] | None:
        """The gap's frames in order, or None where not all are there as these settings draw them."""
        folder, num_frames = self._gap_folder(gap), self.settings["frame_interval"]
        paths = [folder / _frame_name(number) for number in range(1, num_frames + 1)]
        return paths if all(path.is_file() for path in paths) else None

    def write_gap(self, gap: Gap, frames: Sequence[Image.Image]) -> None:
        """All frames of a gap, or none of them."""
        with output_folder(self._gap_folder(gap), made_with=GAP_FILE) as folder:
            for number, frame in enumerate(frames, start=1):
                frame.save(folder / _frame_name(number))
            _write_json(folder / GAP_FILE, self._facts(gap))

    def write_film(self, anchors: Sequence[Path], gaps: Sequence[Gap], record: dict) -> list[Path]:
        """frames/ of all gaps, which are drawn, and the anchors between them; the frames in order.

        An anchor that is a PNG file stays the same, byte for byte. Gaps that the film no longer has go, and
        what a killed process left half-written.
        """
        used = [self._gap_folder(gap) for gap in gaps]
        with output_folder(self.folder / FRAMES_FOLDER, made_with=FILM_FILE) as folder:
            number = 0
            for anchor, gap in zip(anchors, [*gaps, None], strict=True):
                (folder / f"{number:06d}.png").write_bytes(as_png(anchor))
                for path in self.find_gap(gap) if gap else ():
                    number += 1
                    _link(path, folder / f"{number:06d}.png")
                number += 1
            names = [path.name for path in used]
            _write_json(folder / FILM_FILE, {**self.settings, **record, "num_frames": number, "gaps": names})
        for path in [*self.folder.glob(f"{GAPS_FOLDER}/*"), *self.folder.glob(".*.tmp")]:
            if path not in used:
                shutil.rmtree(path)
        return sorted((self.folder / FRAMES_FOLDER).glob("*.png"))

    def _gap_folder(self, gap: Gap) -> Path:
        facts = json.dumps(self._facts(gap), sort_keys=True)
        return self.folder / GAPS_FOLDER / hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _facts(self, gap: Gap) -> dict:
        anchors = [
            hashlib.sha256(repr(anchor.size).encode() + anchor.tobytes()).hexdigest()
            for anchor in (gap.first, gap.last)
        ]
        return {**self.settings, "anchors": anchors, "story": gap.story.to_dict()}


def _frame_name(number: int) -> str:
    return f"{number:03d}.png"


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)  # the film's frames take no second place on disk
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

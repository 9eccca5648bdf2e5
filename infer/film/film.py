"""Makes a film: draws the gaps that are missing, puts the frames in order, writes the mp4.

film.mp4 is made with film.parts/ beside it, which has every frame as PNG and a filmstrip to look at. Started
again, it draws only what is missing or was changed.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from infer.film.gap import DrawGap, Gap, check_frame_interval, gaps_between, read_anchors
from infer.film.mp4 import chapters_of, write_mp4
from infer.film.parts import FilmParts
from infer.frame_folder import read_frame
from storyanchors.contact_sheet import draw_comparison
from storyanchors.story import Story

FILMSTRIP_FILE = "filmstrip.png"
FILMSTRIP_COLUMNS, FILMSTRIP_MAX_ROWS = 8, 24


def make_film(
    anchors: Sequence[Path],
    story: Story,
    out: Path,
    *,
    draw: DrawGap,
    settings: dict,
    frame_interval: int,
    fps: float,
    progress: bool = True,
) -> Path:
    """The mp4 of a story whose frames are the files `anchors`, in order; returns the folder of its parts.

    settings: what decides the pixels that draw makes, by name, "interpolator" among them. ValueError for
    anchors, a story, an interval, an fps or an out that do not fit.
    """
    check_frame_interval(frame_interval)
    if not 1 <= fps <= 240:
        raise ValueError(f"fps={fps}, expected 1 to 240")
    parts_folder = check_out(out)
    gaps = gaps_between(read_anchors(anchors), story)
    settings = {**settings, "frame_interval": frame_interval}
    parts = FilmParts(parts_folder, settings)
    draw_missing(gaps, parts, draw, progress=progress)
    paths = parts.write_film(anchors, gaps, {"fps": fps, "story": story.to_dict()})
    draw_filmstrip(gaps, parts).save(parts_folder / FILMSTRIP_FILE)
    made_with = f"storyanchors, {settings['interpolator']}, {frame_interval} frames between story frames"
    write_mp4(
        out,
        _shown(paths, progress),
        size=gaps[0].first.size,
        fps=fps,
        keyframes=range(0, len(paths), frame_interval + 1),
        chapters=chapters_of(story, frame_interval),
        metadata={"title": out.stem, "comment": story.prompt(), "description": made_with},
    )
    return parts_folder


def check_out(out: Path) -> Path:
    """The folder of out's parts; ValueError or OSError where out cannot be written or is another's file."""
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"out={out} must be the name of an .mp4 file")
    parts_folder = out.with_suffix(".parts")
    if out.exists() and not parts_folder.is_dir():
        raise ValueError(f"{out} exists and was not made by this command (no {parts_folder}): choose another")
    parts_folder.mkdir(parents=True, exist_ok=True)
    return parts_folder


def draw_missing(gaps: Sequence[Gap], parts: FilmParts, draw: DrawGap, *, progress: bool) -> None:
    """One gap after the other, each on disk before the next: the same bytes, however often one is stopped."""
    interval = parts.settings["frame_interval"]
    with tqdm(total=len(gaps) * interval, desc="drawing", unit="frame", disable=not progress) as bar:
        for gap in gaps:
            if parts.find_gap(gap) is None:
                parts.write_gap(gap, draw(gap, interval))
            bar.update(interval)


def draw_filmstrip(gaps: Sequence[Gap], parts: FilmParts) -> Image.Image:
    """A row for each gap: its anchors and, at equal steps, some of the frames between them."""
    rows = []
    for number, gap in enumerate(gaps[:FILMSTRIP_MAX_ROWS], start=1):
        paths, last = parts.find_gap(gap), FILMSTRIP_COLUMNS - 1
        inner = [round(column * (len(paths) + 1) / last) - 1 for column in range(1, last)]
        chosen = [read_frame(paths[index]) for index in inner if 0 <= index < len(paths)]
        told = gap.story.descriptions()[0][0]
        rows.append((f"{number} to {number + 1}: {told}", [gap.first, *chosen, gap.last]))
    return draw_comparison(rows)


def _shown(paths: Iterable[Path], progress: bool) -> Iterator[Image.Image]:
    for path in tqdm(paths, desc="mp4", unit="frame", disable=not progress):
        yield read_frame(path).convert("RGB")

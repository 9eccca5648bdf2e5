"""Draws a story that has its frames: a contact sheet, a comic page, a strip of film, or an offline HTML page.

python infer/draw_story.py project=PROJECT out=PAGE.png layout=comic
python infer/draw_story.py frames=DIR story=FILE out=PAGE.html

A page has the events with their ranges, seeds and the whole history, and needs no network; layout is for
pictures. A folder of frames that has a story.yaml needs no story=.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from conf.command import run
from infer.frame_folder import as_png
from infer.project.whole_files import write_whole
from infer.shown_story import ShownStory, read_frames_and_story, read_shown
from infer.story_page import story_page
from storyanchors.comic_page import draw_comic_page
from storyanchors.contact_sheet import draw_contact_sheet, draw_strip
from storyanchors.lettering import check_font

LAYOUTS = ("sheet", "comic", "strip")
HTML = (".html", ".htm")


@dataclass
class DrawStoryConfig:
    project: str | None = None  # a story project
    version: int | None = None  # one of its versions; null = the present one
    frames: str | None = None  # or a folder with 001.png, 002.png, ...
    story: str | None = None  # and its story file; null = story.yaml in that folder
    out: str = MISSING  # a .png or .html file
    layout: str = MISSING  # of a .png: sheet, comic or strip
    title: str | None = None  # of a comic or a page; null = made of the story's subjects
    font: str | None = None  # a font file to be asked before all others


def main(config: DrawStoryConfig) -> None:
    out = Path(config.out)
    check_out(out)
    if config.layout not in LAYOUTS:
        raise ValueError(f"unknown layout {config.layout!r}, expected one of {', '.join(LAYOUTS)}")
    if config.font:
        check_font(config.font)
    shown = read_wanted(config)
    if out.suffix.lower() in HTML:
        folder = Path(config.project) if config.project else None
        content = story_page(shown, folder, config.title).encode()
    else:
        content = as_png(draw(shown, config))
    write_out(out, content)


def read_wanted(config: DrawStoryConfig) -> ShownStory:
    """The story that the settings name; ValueError where they name none, or two."""
    if (config.project is None) == (config.frames is None):
        raise ValueError(
            "expected project=PROJECT or frames=DIR, found " + ("both" if config.project else "neither")
        )
    if config.project:
        if config.story:
            raise ValueError("a project has its own story: story= goes with frames=")
        return read_shown(config.project, config.version)
    if config.version is not None:
        raise ValueError("version= goes with project=: a folder of frames has no versions")
    return read_frames_and_story(config.frames, config.story)


def draw(shown: ShownStory, config: DrawStoryConfig) -> Image.Image:
    """The picture in the layout that is asked for."""
    frames = shown.frames()
    match config.layout:
        case "comic":
            return draw_comic_page(frames, shown.story, title=config.title, font=config.font)
        case "strip":
            return draw_strip(frames, shown.story, font=config.font)
    return draw_contact_sheet(frames, shown.story, given=shown.given, locked=shown.locked, font=config.font)


def check_out(out: Path) -> None:
    """ValueError for a name that says neither picture nor page."""
    if out.suffix.lower() not in (".png", *HTML):
        raise ValueError(f"out={out} must be the name of a .png or .html file")


def write_out(out: Path, content: bytes) -> None:
    """Writes the file whole or not at all, and says so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, content)
    print(f"{out} ({len(content) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main, DrawStoryConfig, "draw_story")

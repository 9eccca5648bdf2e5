"""Two versions of a story side by side, as a picture or an offline HTML page: what is the same, what changed.

python infer/compare_stories.py a=PROJECT b=OTHER out=COMPARISON.png
python infer/compare_stories.py a=PROJECT@1 b=PROJECT out=COMPARISON.html

a and b are projects, versions of them (PROJECT@3, or a_version=3), or folders of frames with a story.yaml.
Frames are paired so that as little as may be has changed: one that was put in moves no other.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from infer.comparison_page import comparison_page, draw_story_comparison
from infer.draw_story import HTML, check_out, write_out
from infer.frame_folder import as_png
from infer.shown_story import read_any
from infer.story_difference import count_pairs, pair_frames
from storyanchors.lettering import check_font


@dataclass
class CompareStoriesConfig:
    a: str = MISSING  # a story project, PROJECT@VERSION, or a folder of frames with its story.yaml
    b: str = MISSING
    a_version: int | None = None  # a version of project a; null = the present one
    b_version: int | None = None
    out: str = MISSING  # a .png or .html file
    font: str | None = None  # a font file to be asked before all others


def main(config: CompareStoriesConfig) -> None:
    out = Path(config.out)
    check_out(out)
    if config.font:
        check_font(config.font)
    a, b = read_any(config.a, config.a_version), read_any(config.b, config.b_version)
    frames_a, frames_b = a.frames(), b.frames()
    pairs = pair_frames(frames_a, frames_b, a.story.descriptions(), b.story.descriptions())
    if out.suffix.lower() in HTML:
        content = comparison_page(a, b, pairs).encode()
    else:
        content = as_png(draw_story_comparison(a, b, frames_a, frames_b, pairs, font=config.font))
    write_out(out, content)
    print(count_pairs(pairs))


if __name__ == "__main__":
    run(main, CompareStoriesConfig, "compare_stories")

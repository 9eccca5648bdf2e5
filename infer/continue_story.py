"""Draws the missing frames of a story around the frames that are given, wherever they stand.

python infer/continue_story.py weights=MODEL story=STORY.yaml frames=FOLDER keep=[1,2,3] out=FOLDER seed=0

frames is a folder with 001.png, 002.png, ... (or .jpg); keep are the numbers to hold fixed, by default all
that are in it. The story says how many frames there are in the end: with six of them, keep=[1] continues,
keep=[1,2,4,5,6] draws frame 3 anew, keep=[1,6] fills in and keep=[5,6] finds a beginning.
Kept PNG files are copied byte for byte. Writes what generate_story.py writes.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from infer.story_run import StoryRunConfig, draw_story, find_frames


@dataclass
class ContinueStoryConfig(StoryRunConfig):
    frames: str = MISSING
    keep: list[int] | None = None  # None = every frame in the folder


def main(config: ContinueStoryConfig) -> None:
    found = find_frames(Path(config.frames))
    keep = sorted(found) if config.keep is None else config.keep
    if missing := sorted(set(keep) - set(found)):
        raise ValueError(f"keep names frames {missing}, but {config.frames} has {sorted(found)}")
    draw_story(config, "continue_story", given={number: found[number] for number in keep})


if __name__ == "__main__":
    run(main, ContinueStoryConfig, "continue_story")

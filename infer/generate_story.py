"""Draws a story from its text alone.

python infer/generate_story.py weights=MODEL story=STORY.yaml out=PROJECT seed=0

PROJECT is a folder: story.yaml, frames/001.png, ..., contact_sheet.png to look at, and history.jsonl, which
holds every version with its settings. Where it is a story project already, all its frames are drawn anew, as
its next version, and fps, frame_interval and motion that are not given are those it was drawn with last.
continue_story.py changes it, restore_story.py goes back.
Ctrl-C, SIGTERM or a kill lose nothing of it; the same command goes on, and draws the same frames.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from infer.story_project import StoryProject, check_new_project, is_project
from infer.story_run import DrawConfig, draw_edit
from storyanchors.story import Story
from storyanchors.story_edit import keep_frames, replace_story


@dataclass
class GenerateStoryConfig(DrawConfig):
    story: str = MISSING  # a story file, YAML or JSON
    out: str = MISSING  # a folder for the project


def main(config: GenerateStoryConfig) -> None:
    story, out = Story.from_file(config.story), Path(config.out)
    if is_project(out):
        project = StoryProject.open(out)
        return draw_edit(config, project, replace_story(project.story, story, []))
    check_new_project(out)
    draw_edit(config, out, keep_frames(story, []))


if __name__ == "__main__":
    run(main, GenerateStoryConfig, "generate_story")

"""Draws a story from its text alone.

python infer/generate_story.py weights=MODEL story=STORY.yaml out=FOLDER seed=0

Writes 001.png, 002.png, ..., contact_sheet.png, story.yaml and run.json, which holds all settings. The folder
appears when it is complete; one that an earlier run made is replaced, any other is refused.
"""

from conf.command import run
from infer.story_run import StoryRunConfig, draw_story


def main(config: StoryRunConfig) -> None:
    draw_story(config, "generate_story", given={})


if __name__ == "__main__":
    run(main, StoryRunConfig, "generate_story")

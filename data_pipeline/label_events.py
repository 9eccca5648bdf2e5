"""Finds the events of every clip with a vision-language model: the first of two stages to a story.

python data_pipeline/label_events.py dataset=DATASET run=NAME vlm=gemini
python data_pipeline/label_events.py dataset=DATASET run=NAME vlm=openai vlm.base_url=URL vlm.model=MODEL
python data_pipeline/label_events.py dataset=DATASET run=NAME vlm=scripted script=story_world

Frames are shown in disjoint, balanced subsets of at most 12. The same command again continues where it was
stopped; no answer is paid twice. Next: unify_story.py with the same words.
"""

from dataclasses import dataclass

from conf.command import run
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import MAX_PIXELS, Events, images_allowed


@dataclass
class LabelEventsConfig(LabelingConfig):
    max_pixels: int = MAX_PIXELS  # larger frames are made smaller before they are sent


def main(config: LabelEventsConfig) -> None:
    run_stage(config, Events(max_images=images_allowed(config), max_pixels=config.max_pixels))


if __name__ == "__main__":
    run(main, LabelEventsConfig, "label_events")

"""Makes one story of a clip's events with a vision-language model: the second stage, after label_events.py.

python data_pipeline/unify_story.py dataset=DATASET run=NAME vlm=gemini caption_encoder=FOLDER_OR_HUB_ID
python data_pipeline/unify_story.py dataset=DATASET run=NAME vlm=openai vlm.base_url=URL vlm.model=MODEL
python data_pipeline/unify_story.py dataset=DATASET run=NAME vlm=scripted script=story_world

All events of a clip are shown together, each with one frame that represents it; what comes back are numbered,
consistent descriptions, subjects by importance and the style, in labels/NAME/story and captions/NAME.
caption_encoder: its token budget is told to the model, and a story that would lose events is asked for again.
"""

from dataclasses import dataclass

from conf.command import run
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import MAX_PIXELS, UnifiedStory, images_allowed


@dataclass
class UnifyStoryConfig(LabelingConfig):
    max_pixels: int = MAX_PIXELS  # larger frames are made smaller before they are sent
    caption_encoder: str | None = None  # a folder, a Hub id or words; None: no budget


def main(config: UnifyStoryConfig) -> None:
    stage = UnifiedStory(
        config.caption_encoder, max_images=images_allowed(config), max_pixels=config.max_pixels
    )
    run_stage(config, stage)


if __name__ == "__main__":
    run(main, UnifyStoryConfig, "unify_story")

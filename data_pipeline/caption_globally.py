"""Writes one chronological caption per clip with a vision-language model: the captions of the first training.

python data_pipeline/caption_globally.py dataset=DATASET run=NAME vlm=gemini
python data_pipeline/caption_globally.py dataset=DATASET run=NAME vlm=openai vlm.base_url=URL vlm.model=MODEL
python data_pipeline/caption_globally.py dataset=DATASET run=NAME vlm=gemini max_usd=20 dry_run=true

Labels go to labels/NAME, captions of them to captions/NAME. The same command again continues where it was
stopped; no answer is paid twice. caption_encoder: its token budget is told to the model, and a caption over
it is asked for again.
"""

from dataclasses import dataclass

from conf.command import run
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import MAX_PIXELS, GlobalCaptions, images_allowed


@dataclass
class CaptionGloballyConfig(LabelingConfig):
    max_pixels: int = MAX_PIXELS  # larger frames are made smaller before they are sent
    caption_encoder: str | None = None  # a folder, a Hub id or words; None: no budget


def main(config: CaptionGloballyConfig) -> None:
    stage = GlobalCaptions(
        max_images=images_allowed(config),
        max_pixels=config.max_pixels,
        caption_encoder=config.caption_encoder,
    )
    run_stage(config, stage)


if __name__ == "__main__":
    run(main, CaptionGloballyConfig, "caption_globally")

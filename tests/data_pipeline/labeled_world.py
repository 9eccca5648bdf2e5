"""Story-world clips labelled through all stages by the exact labeler, which four clips throw off."""

import json
from pathlib import Path

from data_pipeline.labeling.exact_labeler import exact_script
from data_pipeline.labeling.runner import LabelingConfig, run_stage
from data_pipeline.labeling.stages import Events, GlobalCaptions, UnifiedStory
from data_pipeline.write_story_world import WriteStoryWorldConfig, write_dataset
from storyanchors.vlm import VlmConfig, VlmRequest

NUM_CLIPS = 12
RUN = "seen"
MARKUP = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""


def write_labeled_world(folder: Path) -> tuple[Path, list[str]]:
    """The dataset and its keys: the first is refused, the second repaired, the third full of markup, the
    fourth warned.
    """
    dataset = folder / "world"
    config = WriteStoryWorldConfig(
        str(dataset), num_stories=NUM_CLIPS, num_frames=[11, 14], clips_per_shard=5, workers=1
    )
    write_dataset(dataset, config)
    truth = [line for path in (dataset / "captions" / "truth").glob("*.jsonl") for line in path.open()]
    keys = sorted(json.loads(line)["key"] for line in truth)
    exact = exact_script(dataset)
    refused, repaired, marked, warned = keys[:4]

    def script(request: VlmRequest) -> str:
        key, stage, *_ = request.name.split("/")
        answer = json.loads(exact(request))
        if (key, stage) == (refused, "events"):
            return json.dumps({"events": [answer["events"][0] | {"description": "I'm sorry, I can't help."}]})
        if (key, stage) == (repaired, "global") and not request.name.endswith("/repair"):
            return "I would say: " + answer["caption"]
        if (key, stage) == (marked, "global"):
            return json.dumps({"caption": f"{answer['caption']} {MARKUP}"})
        if (key, stage) == (marked, "story"):
            events = [
                event | {"description": f"{event['description']} {MARKUP}"} for event in answer["events"]
            ]
            subjects = [{"name": f"{one['name']} {MARKUP}", "appearance": ""} for one in answer["subjects"]]
            return json.dumps({"subjects": subjects, "style": MARKUP, "events": events})
        if (key, stage) == (warned, "global"):
            return json.dumps({"caption": f"The video shows this: {answer['caption']}"})
        return json.dumps(answer)

    vlm = VlmConfig(
        "scripted", input_usd_per_million=1.0, output_usd_per_million=4.0, price_date="2026-11-21"
    )
    for stage in (GlobalCaptions(), Events(), UnifiedStory()):
        run_stage(LabelingConfig(str(dataset), RUN, vlm), stage, script=script)
    return dataset, keys

"""Writes the accepted answers of a labeling run as conversations, to fine-tune one's own labeler on them.

python data_pipeline/export_labels.py dataset=DATASET run=RUN out=FOLDER
python data_pipeline/export_labels.py dataset=DATASET run=RUN out=FOLDER warned=false

FOLDER/<stage>.jsonl has one line per question, {"id", "messages", "images"}: what was sent, word for word and
image for image, and the answer as it became after checks and repairs. Images lie in FOLDER/images, once each.
Questions and answers come from the ledger; nothing is sent.
"""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from tqdm import tqdm

from conf.command import run
from data_pipeline.dataset import FRAMES_FOLDER, read_record
from data_pipeline.labeling.ledger import ShardLedger
from data_pipeline.labeling.partition import STAGES, label_lines, labels_folder, read_run, settled_shards
from data_pipeline.labeling.runner import LabelClip, Stage, clips_of_shard, ledger_identities
from data_pipeline.labeling.stages import reopen_stage
from data_pipeline.labeling.turns import Ask, Check, Settled, ask_ledger
from data_pipeline.shard_reader import finished_shards
from storyanchors.output_folder import check_output_folder, output_folder
from storyanchors.vlm import VlmRequest

RECORD_FILE = "export.json"
IMAGES_FOLDER = "images"


@dataclass
class ExportLabelsConfig:
    dataset: str = MISSING
    run: str = MISSING
    out: str = MISSING
    warned: bool = True  # with the clips that have warnings


@dataclass
class Exported:
    """Of one stage. `lost` are clips whose answers the ledger no longer has, or today's checks refuse."""

    clips: int = 0
    questions: int = 0
    lost: int = 0


def main(config: ExportLabelsConfig) -> None:
    out = Path(config.out)
    exported = export(Path(config.dataset), config.run, out, warned=config.warned)
    for stage, counts in exported.items():
        lost = f", {counts.lost} clips left out: no accepted answer in the ledger" if counts.lost else ""
        print(f"{out / stage}.jsonl: {counts.questions} questions about {counts.clips} clips{lost}")


def export(dataset: Path, run: str, out: Path, *, warned: bool = True) -> dict[str, Exported]:
    """The folder appears whole.

    ValueError for an unknown run, one that was asked with other prompts, and nothing to export.
    """
    read_record(dataset)
    begun = read_run(dataset, run)["stages"]
    accepted = ("ok", "warned") if warned else ("ok",)
    check_output_folder(out, made_with=RECORD_FILE)
    exported = {}
    with output_folder(out, made_with=RECORD_FILE) as folder:
        (folder / IMAGES_FOLDER).mkdir()
        for name in (name for name in STAGES if name in begun):
            stage = reopen_stage(dataset, run, name)
            exported[name] = asyncio.run(_export_stage(dataset, run, stage, accepted, folder))
        if not any(counts.questions for counts in exported.values()):
            raise ValueError(f"labeling run {run!r} of {dataset} has no accepted answer: nothing to export")
        record = {"dataset": dataset.name, "run": run, "warned": warned, "stages": begun}
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return exported


async def _export_stage(
    dataset: Path, run: str, stage: Stage, accepted: tuple[str, ...], folder: Path
) -> Exported:
    exported = Exported()
    settled = settled_shards(dataset, run, stage.name)
    identities = ledger_identities(dataset, run, stage.name)
    shards = [shard for shard in finished_shards(dataset / FRAMES_FOLDER) if shard in settled]
    with open(folder / f"{stage.name}.jsonl", "w", encoding="utf-8") as file:
        for shard in tqdm(shards, desc=stage.name, unit="shard", disable=None):
            lines = label_lines(dataset, run, stage.name, shard)
            good = {line["key"] for line in lines if line["status"] in accepted}
            ledger = ShardLedger(labels_folder(dataset, run), stage.name, shard, "none")  # only read
            ask = ask_ledger(ledger, stage.name, stage.prompts, identities)
            for clip in clips_of_shard(dataset, run, stage.name, shard):
                if clip.key not in good:
                    continue
                answered = await _answered(stage, clip, ask)
                exported.clips += bool(answered)
                exported.lost += not answered
                exported.questions += len(answered)
                for request, settled_request in answered:
                    file.write(json.dumps(conversation(request, settled_request, folder)) + "\n")
    return exported


async def _answered(stage: Stage, clip: LabelClip, ask: Ask) -> list[tuple[VlmRequest, Settled]]:
    """The clip's questions with their answers, in the order of their names; none unless all are accepted."""
    asked: list[tuple[VlmRequest, Settled]] = []

    async def remember(request: VlmRequest, check: Check) -> Settled:
        settled = await ask(request, check)
        asked.append((request, settled))
        return settled

    await stage.label(clip, remember)
    if any(settled.status != "ok" for _, settled in asked):
        return []
    return sorted(asked, key=lambda pair: pair[0].name)


def conversation(request: VlmRequest, settled: Settled, folder: Path) -> dict:
    """One line: texts and images as they were sent, the answer's JSON as the model should have written it.

    Images are written below folder, and named relative to it, as transformers' chat templates take them.
    """
    content, images = [], []
    for part in request.parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            images.append(_write_image(folder, part))
            content.append({"type": "image", "image": images[-1]})
    answer = [{"type": "text", "text": settled.answer.model_dump_json()}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": request.name, "messages": messages, "images": images}


def _write_image(folder: Path, jpeg: bytes) -> str:
    """The same image is one file, however many questions show it."""
    digest = hashlib.sha256(jpeg).hexdigest()[:32]
    name = f"{IMAGES_FOLDER}/{digest[:2]}/{digest}.jpg"
    if not (folder / name).exists():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg)
    return name


if __name__ == "__main__":
    run(main, ExportLabelsConfig, "export_labels")

"""Can a model's stories be steered? Continue, edit, insert, delete, fill in, extend, with exact scores.

python benchmarks/steering.py --models ours=MODEL paper=MODEL --jobs 2                  # 100 stories per task
python benchmarks/steering.py --models ours=MODEL --num-stories 4 --tasks edit infill   # a look

Each task (steering_tasks.py) asks every model the same of the same held-out stories with the same noise.
OUT/MODEL/TASK.json appears whole; what is there of the same weights and cases is not done again, so a killed
run goes on where it was. Prints the table of all tasks; --publish also writes it where the repository keeps
it: benchmarks/results/steering.txt and .json, docs/steering.md, docs/steering.png.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.steering_cases import OVERLAP, TRAINED_FRAMES, Case
from benchmarks.steering_report import publish, text_table
from benchmarks.steering_scores import Samples, copy, guess, score_case
from benchmarks.steering_tasks import TASKS
from benchmarks.timing import describe_machine
from infer.frame_folder import as_png
from infer.story_project import StoryProject
from infer.story_run import hash_weights
from storyanchors.conditioning import ClipConditions
from storyanchors.generator import StoryGenerator
from storyanchors.story_request import StoryRequest
from storyanchors.story_world.dense import FPS, FRAME_INTERVAL

BASELINES = ("guess", "copy")  # draw nothing; drawn for every table
GUESSES = 3  # of every case: a guesser's scores vary more than a model's
CONDITIONS = ClipConditions(FPS, FRAME_INTERVAL)
NUM_EXAMPLES = 10  # stories of each task whose frames are kept, for the picture
NUM_PROJECTS = 10  # stories of a task that go through a story project on disk
LONGEST_FIRST = ("extend_at_once", "extend", "extend_anonymous")


@dataclass(frozen=True)
class Job:
    """One task of one model; weights None: a baseline."""

    model: str
    weights: str | None
    task: str
    num_stories: int
    dtype: str
    batch: int
    out: Path

    @property
    def path(self) -> Path:
        return self.out / self.model / f"{self.task}.json"


def main() -> None:
    args = _arguments()
    models = dict(pair.split("=", 1) for pair in args.models)
    if taken := set(models) & set(BASELINES):
        raise SystemExit(f"--models: {', '.join(taken)} is the name of a baseline")
    models |= dict.fromkeys(BASELINES)
    jobs = [
        Job(model, weights, task, args.num_stories, args.dtype, args.batch, args.out)
        for task in sorted(args.tasks, key=lambda task: task not in LONGEST_FIRST)
        for model, weights in models.items()
    ]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for job, seconds in tqdm(pool.map(run_job, jobs), total=len(jobs), unit="task", smoothing=0):
            tqdm.write(f"{job.model} {job.task}: " + ("was there" if seconds is None else f"{seconds:.1f} s"))
    records = {
        model: {task: _read(args.out / model / f"{task}.json") for task in args.tasks} for model in models
    }
    print(text_table(records))
    if args.publish:
        publish(records, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--num-stories", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--batch", type=int, default=8, help="stories per forward")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--publish", action="store_true", help="write results/, docs/ and the picture")
    return parser.parse_args()


def run_job(job: Job) -> tuple[Job, float | None]:
    """Draws and scores a task's cases; returns the CPU seconds, None where that was done before."""
    cases = list(TASKS[job.task].cases(job.num_stories))
    made_from = {
        "weights_sha256": hash_weights(Path(job.weights)) if job.weights else None,
        "dtype": job.dtype if job.weights else None,
        "cases_sha256": fingerprint(cases),
    }
    if (found := _read(job.path)) and found["made_from"] == made_from:
        return job, None
    start, samples = time.process_time(), []
    for index, frames in enumerate(drawn_by(job, cases)):
        number = index % len(cases)
        samples.append(score_case(frames, cases[number]))
        if job.weights and "locked_png" in TASKS[job.task].scores and index < NUM_PROJECTS:
            samples[-1]["locked_png"] = locked_files(cases[index], frames)
        if index < NUM_EXAMPLES:
            _save_strip(job.path.parent / job.task / f"{index}.png", frames)
    record = {
        "model": job.model,
        "task": job.task,
        "made_from": made_from,
        "num_stories": job.num_stories,
        "machine": describe_machine(torch.device("cpu")),
        "cpu_seconds": round(time.process_time() - start, 1),
        "sums": _sums(samples),
    }
    _write_whole(job.path, json.dumps(record))
    return job, record["cpu_seconds"]


def fingerprint(cases: list[Case]) -> str:
    """The same for cases that ask the same: stories, texts and every pixel."""
    digest = hashlib.sha256()
    for case in cases:
        windows = [asdict(window) for window in case.windows]
        asked = [case.edit.story.to_dict(), case.edit.kept, repr(case.truth), case.caption, windows]
        asked.append(sorted(case.members))
        digest.update(json.dumps(asked).encode())
        for frame in case.frames:
            digest.update(frame.tobytes())
    return digest.hexdigest()


def drawn_by(job: Job, cases: list[Case]) -> Iterator[list[Image.Image]]:
    """The frames of every case, in order; a guesser's several times; none where nothing can be copied."""
    if job.model == "guess":
        for number in range(GUESSES):
            yield from (guess(case, np.random.default_rng((number, i))) for i, case in enumerate(cases))
    elif job.model == "copy":
        yield from (copy(case) for case in cases if case.given)
    else:
        generator = _generator(job.weights, job.dtype)
        for first in range(0, len(cases), job.batch):
            yield from draw(generator, cases[first : first + job.batch], first)


@cache
def _generator(weights: str, dtype: str) -> StoryGenerator:
    return StoryGenerator.from_pretrained(weights, dtype=getattr(torch, dtype))


def draw(generator: StoryGenerator, cases: list[Case], first: int) -> list[list[Image.Image]]:
    """The frames of cases number first, first + 1, ...; their numbers are the seeds of their noise."""
    if cases[0].windows:
        return [
            generator.redraw(
                case.edit,
                case.frames if case.edit.kept else {},
                conditions=CONDITIONS,
                seed=1000 * number,
                window=TRAINED_FRAMES,
                overlap=OVERLAP,
                progress=False,
            )
            for number, case in enumerate(cases, start=first)
        ]
    requests = [
        StoryRequest(case.edit.story, case.given, conditions=CONDITIONS, caption=case.caption, seed=number)
        for number, case in enumerate(cases, start=first)
    ]
    return generator.generate_many(requests, progress=False)


def locked_files(case: Case, frames: list[Image.Image]) -> list[float]:
    """Of the kept frames, which are byte-identical PNG files after the edit in a real project on disk."""
    with tempfile.TemporaryDirectory() as folder:
        before = dict(enumerate(case.frames, start=1))
        project = StoryProject.create(Path(folder) / "project", case.before, before, {"seed": 0})
        files_before = _files(project)
        project.commit(case.edit, {number: frames[number - 1] for number in case.edit.drawn()}, {"seed": 0})
        files = _files(project)
        drawn = [files[number] == as_png(frames[number - 1]) for number in case.edit.drawn()]
        assert all(drawn), "a drawn frame is another one on disk"
        return [float(files[after] == files_before[old]) for after, old in case.edit.kept.items()]


def _files(project: StoryProject) -> dict[int, bytes]:
    paths = sorted((project.folder / "frames").glob("*.png"))
    return {int(path.stem): path.read_bytes() for path in paths}


def _sums(samples: list[Samples]) -> dict[str, list[tuple[float, int]]]:
    """For every score its sum and count in each story that has it: means and standard errors follow."""
    names = sorted({name for one in samples for name in one})
    return {name: [(sum(one[name]), len(one[name])) for one in samples if name in one] for name in names}


def _save_strip(path: Path, frames: list[Image.Image]) -> None:
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * width, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()

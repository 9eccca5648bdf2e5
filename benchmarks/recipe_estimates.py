"""The figures of docs/recipe.md: train.estimate for three networks on 8, 64 and 512 H100, all three stages.

python benchmarks/recipe_estimates.py > benchmarks/results/recipe_estimates.txt

No GPU is involved: FLOPs, memory and balance are counted, the MFU (0.40) is assumed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conf.command import read_config
from train.costs.estimated_run import Estimate, EstimateConfig
from train.estimate import advice_lines, memory_lines, run_lines

STEPS = {8: (2000, 4000, 2000), 64: (4000, 8000, 4000), 512: (2000, 4000, 2000)}  # of the three stages
CLIPS = {8: 64, 64: 256, 512: 1024}  # of a step
PEAK_LR = {"wan-1.3b": 2.0e-5, "step-4b": 1.0e-4, "wan-14b": 1.0e-5}  # at 256 clips a step
LAYOUTS = {  # (network, GPUs): cluster, sequence_parallel, packs_per_batch, max_tokens
    ("wan-1.3b", 8): ("zero2", 1, 16, 160_000),
    ("wan-1.3b", 64): ("zero2", 1, 64, 172_800),
    ("wan-1.3b", 512): ("zero2", 2, 256, 172_800),
    ("step-4b", 8): ("zero2", 2, 16, 172_800),
    ("step-4b", 64): ("zero2", 2, 64, 172_800),
    ("step-4b", 512): ("zero2", 2, 256, 172_800),
    ("wan-14b", 8): ("zero3", 8, 32, 120_000),
    ("wan-14b", 64): ("zero3", 4, 64, 172_800),
    ("wan-14b", 512): ("zero3", 4, 256, 172_800),
}
STAGES = ("global_caption", "multi_event", "continuation")


def words_of(model: str, gpus: int, stage: int) -> list[str]:
    cluster, sequence_parallel, packs, max_tokens = LAYOUTS[model, gpus]
    words = [
        f"stage={STAGES[stage]}",
        f"model={model}",
        f"cluster={cluster}",
        f"nodes={gpus // 8}",
        f"stage.steps={STEPS[gpus][stage]}",
        f"data.clips_per_batch={CLIPS[gpus]}",
        f"data.packs_per_batch={packs}",
        f"data.max_tokens={max_tokens}",
        f"optimizer.lr={PEAK_LR[model] * (CLIPS[gpus] / 256) ** 0.5:.1e}",
        "checkpoint.keep_every_n_steps=1000",
    ]
    if sequence_parallel > 1:
        words.append(f"model.sequence_parallel={sequence_parallel}")
    return words


def main() -> None:
    totals = []
    for model, gpus in LAYOUTS:
        hours = []
        for stage in range(3):
            words = words_of(model, gpus, stage)
            estimate = Estimate.of(read_config(EstimateConfig, "run_stage", words))
            hours.append(estimate.hours)
            if STAGES[stage] == "multi_event":
                print(f"$ python -m train.estimate {' '.join(words)}")
                lines = [*run_lines(estimate), *memory_lines(estimate), *advice_lines(estimate)]
                print("\n".join(lines), end="\n\n")
                middle = estimate
        totals.append(_row(model, gpus, middle, hours))
    columns = ("network", "H100", "clips a step", "s a step", "MFU in all", "balance", "hours of each stage")
    columns = (*columns, "days", "GPU-hours")
    print("\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *totals]))


def _row(model: str, gpus: int, estimate: Estimate, hours: list[float]) -> str:
    flops = 3 * estimate.work.flops / (gpus * estimate.step.total * 989.4e12)
    cells = [model, gpus, CLIPS[gpus], f"{estimate.step.total:.1f}", f"{flops:.2f}"]
    cells += [f"{estimate.step.balance:.3f}", ", ".join(f"{hour:.0f}" for hour in hours)]
    cells += [f"{sum(hours) / 24:.1f}", f"{sum(hours) * gpus:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()

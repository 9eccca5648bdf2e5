"""Prints what a run would need, before anything is launched: memory per GPU, steps, hours, storage.

python train/estimate.py stage=multi_event model=wan-14b cluster=zero3 nodes=8 data.dataset=DATASET \\
    data.clips_per_batch=256
python -m train.estimate stage=multi_event model=wan-1.3b cluster=zero2 nodes=8 data.clips_per_batch=256
python -m train.estimate ... gpu=h200 mfu=0.35 mix.clips=500000 mix.frames=[8,16] mix.sizes=[480x832,720x1280]

It takes the words of run_stage, and nodes, gpus_per_node, gpu and mfu; without data.dataset a mix of clips
(mix.*). The share of the peak that a busy GPU reaches (mfu) is an assumption; everything else is counted.
Exit status 1 where the run does not fit, after the words that would make it fit.
"""

from conf.command import run
from train.costs.advice import MOST_NODES, Remedy, most_tokens, remedies, smallest_machine
from train.costs.estimated_run import Estimate, EstimateConfig, train_factor
from train.costs.memory_model import GIB, Network
from train.costs.training_cost import SAVE_BYTES_PER_S, STOP_MARGIN_S, checkpoint_bytes
from train.watching.hardware import peak_flops


def main(config: EstimateConfig) -> None:
    """ValueError where the run does not fit."""
    estimate = Estimate.of(config)
    for line in (*run_lines(estimate), *memory_lines(estimate), *advice_lines(estimate)):
        print(line, flush=True)
    if not estimate.fits:
        total, available = estimate.memory.total / GIB, config.layout.gpu_bytes / GIB
        raise ValueError(f"the run does not fit: {total:.2f} GiB of a GPU's {available:.0f} GiB")


def run_lines(estimate: Estimate) -> list[str]:
    config, work, step, clips = estimate.config, estimate.work, estimate.step, estimate.clips
    network, world_size, steps = Network.of(config.model), config.world_size, config.stage.steps
    flops, seen = train_factor(config.model) * work.flops, steps * work.clips
    useful = flops / (world_size * step.total * peak_flops(config.gpu.upper()))
    checkpoint = checkpoint_bytes(network)
    kept = config.checkpoint.keep_last + 1 + steps // (config.checkpoint.keep_every_n_steps or steps + 1)
    rate = work.clips * clips.clip_bytes / step.total
    source = "of the dataset" if config.has_dataset else "of mix.*, there is no dataset"
    return [
        f"{config.model.preset}, stage {config.stage.name}, on {config.nodes} x {config.gpus_per_node} "
        f"{config.gpu.upper()}, {config.layout.strategy}: an estimate, not a measurement",
        f"parameters     {network.num_weights / 1e9:.3f} G, {network.num_trained / 1e9:.3f} G trained",
        f"clips          {clips.number} {source}, the longest has {estimate.longest_clip} tokens",
        f"step           {work.clips:.1f} clips, {work.tokens:.0f} tokens, {flops / 1e15:.2f} PFLOP; "
        f"{work.micro_steps} micro-steps, largest pack {work.largest_pack} tokens",
        f"seconds/step   {step.total:.2f}: network {step.network:.2f}, codec and text "
        f"{step.frozen_parts:.2f}, traffic {step.traffic:.2f}, jitter {step.jitter:.2f}",
        f"MFU            {config.mfu:.2f} while computing (assumed), {useful:.3f} in all; "
        f"balance of packs {step.balance:.3f}",
        f"stage          {steps} steps, {seen:.0f} clips ({seen / clips.number:.2f} epochs), "
        f"{estimate.hours:.1f} h, {estimate.hours * world_size:.0f} GPU-hours",
        f"storage        checkpoint {checkpoint / 1e9:.1f} GB, {kept} at a time: "
        f"{kept * checkpoint / 1e9:.0f} GB; dataset {clips.number * clips.clip_bytes / 1e12:.2f} TB",
        f"reading        {rate / 1e6:.0f} MB/s in all, {rate / world_size / 1e6:.2f} MB/s a GPU",
        f"stop           sbatch --signal=SIGUSR1@{estimate.stop_seconds}: a step, a save at "
        f"{SAVE_BYTES_PER_S / 1e9:.0f} GB/s (assumed) and {STOP_MARGIN_S} s",
    ]


def memory_lines(estimate: Estimate) -> list[str]:
    memory, available = estimate.memory, estimate.config.layout.gpu_bytes
    modes = memory.block_modes
    kinds = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
    lines = [f"memory of a GPU at its worst moment (checkpointing of blocks: {kinds}):"]
    lines += [f"  {name:<29}{size / GIB:8.2f} GiB" for name, size in memory.parts.items()]
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    lines.append(f"  {'total':<29}{memory.total / GIB:8.2f} of {available / GIB:.0f} GiB: {verdict}")
    if memory.host:
        host = sum(memory.host.values()) * estimate.config.gpus_per_node / GIB
        lines.append(f"  {'in the memory of a host':<29}{host:8.2f} GiB ({', '.join(memory.host)})")
    return lines


def advice_lines(estimate: Estimate) -> list[str]:
    """The largest pack that fits; where the run does not, words that make it fit."""
    if estimate.fits:
        return [f"largest pack that fits: {most_tokens(estimate.config)} tokens (data.max_tokens)"]
    nodes, gpus = estimate.config.nodes, estimate.config.gpus_per_node
    found = remedies(estimate)
    lines = ["what fits, with these words added at the end of yours:", *map(_remedy_line, found)]
    if not found:
        lines = [f"nothing makes it fit on {nodes} x {gpus} {estimate.config.gpu.upper()}"]
    if not any("model.lora" not in remedy.words for remedy in found):
        machine = smallest_machine(estimate)
        lines.append("the fewest GPUs on which the whole network would train, with these words added:")
        lines.append(_remedy_line(machine) if machine else f"  none found up to {MOST_NODES} nodes")
    if any("offload=true" in line for line in lines):
        lines.append("the hours do not count what offload costs: its transfers, and Adam on processors")
    if any("model.lora" in line for line in lines):
        lines.append("a LoRA trains an adapter of the network, not all of it")
    return lines


def _remedy_line(remedy: Remedy) -> str:
    return (
        f"  {remedy.words}    # {remedy.estimate.work.clips:.1f} clips a step, {remedy.estimate.hours:.1f} h"
    )


if __name__ == "__main__":
    run(main, EstimateConfig, "run_stage")

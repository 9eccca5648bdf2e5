"""How long a checkpoint holds up the steps: written in the background, and waited for.

python benchmarks/checkpoint_save.py --folder /scratch --parameters 31_250_000

One process's float32 weights, average and two moments, 16 bytes a parameter, as DDP or one GPU has them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from train.saving.checkpoint_writer import CheckpointWriter
from train.saving.checkpoints import CheckpointConfig, find_damage, hashed_files
from train.saving.tensor_ranges import TensorRange, read_into

NUM_TENSORS = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--parameters", type=int, default=31_250_000)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    size = arguments.parameters // NUM_TENSORS
    names = [f"blocks.{number}" for number in range(NUM_TENSORS)]
    kinds = {"model": [""], "ema": [""], "optimizer": ["exp_avg/", "exp_avg_sq/"]}
    files = {
        f"{kind}-00000-of-00001.safetensors": [
            TensorRange(prefix + name, (size,), 0, torch.randn(size)) for prefix in prefixes for name in names
        ]
        for kind, prefixes in kinds.items()
    }
    num_bytes = sum(part.values.nbytes for ranges in files.values() for part in ranges)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), files, num_bytes, arguments.saves)


def measure(run_dir: Path, files: dict[str, list[TensorRange]], num_bytes: int, num_saves: int) -> None:
    writer, held, whole = CheckpointWriter(run_dir, "attempt"), [], []
    for step in range(1, num_saves + 2):
        begin = time.perf_counter()
        writer.begin(step, files, {})
        held.append(time.perf_counter() - begin)
        checkpoint = writer.commit(writer.wait().files, CheckpointConfig(keep_last=1))
        writer.release()
        whole.append(time.perf_counter() - begin)
    writer.close()
    print(f"{num_bytes / 1e6:.0f} MB, {num_saves} saves after the first one")
    first, *held = held
    print(f"in the background: steps wait {statistics.median(held):.3f} s (the first time {first:.3f} s)")
    seconds = statistics.median(whole[1:])
    speed = num_bytes / seconds / 1e9
    print(f"waited for:        steps wait {seconds:.3f} s ({speed:.2f} GB/s, hashed and synced)")
    begin = time.perf_counter()
    assert find_damage(checkpoint.folder, hashed_files(checkpoint.folder)) is None
    hashed = time.perf_counter() - begin
    for name, ranges in files.items():
        read_into([checkpoint.folder / name], ranges)
    print(f"going on from it:  {hashed:.3f} s to hash, {time.perf_counter() - begin - hashed:.3f} s to read")


if __name__ == "__main__":
    main()

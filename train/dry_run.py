"""What a run would do, in words: who trains on how much of what. Nothing is written, no GPU is touched."""

from itertools import islice

from train.clips.clip_index import ClipIndex
from train.data_plan import DataPlan

STEPS = 3  # of the plan's head


def describe_run(
    clips: ClipIndex, plan: DataPlan, *, num_nodes: int, num_on_node: int, num_data_ranks: int, num_steps: int
) -> str:
    """The world, how a step's packs fall to it, and the first steps of a new run."""
    num_packs = plan.packs_per_batch
    micro_steps = num_packs // num_data_ranks
    world = f"{num_nodes * num_on_node} ranks, {num_on_node} on each of {num_nodes} nodes"
    lines = [
        f"{world}; data ranks: {num_data_ranks}",
        f"{len(clips)} clips; {num_steps} steps of {num_packs} packs, {micro_steps} for each data rank",
    ]
    of_rank = [plan.packs(0, rank=rank, world_size=num_data_ranks) for rank in range(num_data_ranks)]
    for step in range(1, STEPS + 1):
        packs = [list(islice(stream, micro_steps)) for stream in of_rank]
        rows = [[clip.row for pack in rank for clip in pack.clips] for rank in packs]
        sizes = [len(rank) for rank in rows]
        tokens = [int(plan.tokens[rank].sum()) for rank in rows]
        costs = [float(plan.costs[rank].sum()) for rank in rows]
        lines.append(
            f"  step {step}: {sum(sizes)} clips, {min(sizes)} to {max(sizes)} a rank, {min(tokens)} to "
            f"{max(tokens)} tokens a rank; useful share {sum(costs) / len(costs) / max(costs):.3f}; "
            f"rank 0 begins with {clips.row(rows[0][0]).key}"
        )
    return "\n".join(lines)

# Sourced by slurm/train_stage.sbatch on the first node of a job; srun hands what is exported to every task.
# What is set already, in the shell or the site's profile, stays. Settings of your network belong there too:
# NCCL_SOCKET_IFNAME, NCCL_IB_HCA; the preflight says what bandwidth they give.

# Where the ranks meet. The address that Slurm itself uses reaches the node from every other one; the port differs
# from start to start, since sockets of the last one may linger.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first_node}"
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))

# `sbatch --export=NONE` and `--export=VARIABLE` would have srun hand on nothing of what is set here.
export SLURM_EXPORT_ENV=ALL
# srun no longer takes it from sbatch (Slurm 22.05): each task would get one core for all its loader workers.
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"
# As many threads in every task as the node has cores would be 8 times too many; workers use one each.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# When a collective times out, every rank writes its last calls; the one that lacks the call is the one that hung.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$start_folder/nccl_calls_}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Frame counts differ from batch to batch; fixed segments would leave gaps that nothing fits in.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# Compiled kernels go to the node's own disk: a lock that a killed build leaves in a shared home stops every later
# run, and 512 processes that write there at once stop the file system.
node_cache="${TMPDIR:-/tmp}/storyanchors-$(id -un)"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$node_cache/extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$node_cache/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$node_cache/inductor}"

# 512 ranks that ask the hub for the same file are refused; `python -m train.doctor` says what is not there yet.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM=false # its threads and our forked workers do not go together
export TORCH_FORCE_WEIGHTS_ONLY_LOAD=1 # no pickle is ever executed, whoever calls torch.load
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # the last lines of a process that is killed are in the log
ulimit -c 0 # eight core dumps of 100 GB each are no help
ulimit -n "$(ulimit -Hn)" # shards and workers' pipes are open files

#!/bin/bash
# Trains under real Slurm, on virtual nodes in a temporary folder: 10 to 20 minutes on two cores.
#
#   bash tests/slurm/run.sh [LOG]        # needs root, slurm-wlm and munge; `pytest -m slurm` runs it
#
# 1. three stages of the tiny preset, 2 tasks on 2 nodes (ZeRO-2 over gloo), undisturbed
# 2. the same; stage 1 is preempted in the middle, a rank of stage 2 is killed, stage 3 is stopped by hand and released
# 3. the weights, averages and moments of 1 and 2 are compared bit for bit
# 4. a wrong setting is not queued again, and takes the later stages along
# 5. the header of the batch file, unchanged, on 64 nodes with --export=VARIABLES: a dry run of 512 ranks
set -u
cd "$(dirname "$0")/../.."
. tests/slurm/cluster.sh
export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
folder=$(mktemp -d) log=${1:-}
trap 'stop_cluster "$folder"; rm -rf "$folder"' EXIT
failures=0 started=$SECONDS

say() { # what happened, without this machine's paths
    printf '%4d s  %s\n' $((SECONDS - started)) "${*//$folder/TMP}" | tee -a "$folder/log.txt"
}
expect() { # WHAT FOUND EXPECTED
    if [ "$2" = "$3" ]; then say "ok: $1: $2"; else
        failures=$((failures + 1))
        say "FAILED: $1: found $2, expected $3"
    fi
}
state() { scontrol --oneliner show job "$1" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'; }
restarts() { scontrol --oneliner show job "$1" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p'; }
wait_until() { # SECONDS WHAT COMMAND...
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $limit ]; then
            failures=$((failures + 1))
            say "FAILED: waited for $what in vain"
            return 1
        fi
        sleep 0.5
    done
}
has_ended() { case $(state "$1") in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL) ;; *) false ;; esac }
has_step() { grep -q "\"step\": $2\b" "$1/metrics.jsonl"; }
is_in_state() { [ "$(state "$1")" = "$2" ]; }

stages() { # NAME -> the jobs' numbers in $jobs
    slurm/all_stages.sh "$folder/$1" -N 2 --ntasks-per-node=1 --cpus-per-task=1 -- \
        experiment=story_world strategy=zero2 data.dataset="$folder/stories" stage.steps=9 \
        checkpoint.every_n_steps=4 log_every_n_steps=1 samples.every_n_steps=0 trainer.enable_progress_bar=false \
        >"$folder/submitted"
    while read -r line; do say "$line"; done <"$folder/submitted"
    mapfile -t jobs < <(sed -n 's/.*: job \([0-9]*\).*/\1/p' "$folder/submitted")
}
bits() { # of the last checkpoint of each stage
    (cd "$folder/$1" && find . -path '*step_00000009/*.safetensors' -print0 | sort -z | xargs -0 sha256sum)
}

"$PYTHON" data_pipeline/write_story_world.py out="$folder/stories" num_stories=24 >/dev/null || exit 1
start_cluster "$folder" 64 || exit 1
say "$(sinfo --version): $(sinfo -h -o '%D nodes of %c cores, %G')"

say "1. undisturbed"
stages undisturbed
wait_until 900 "the undisturbed stages" has_ended "${jobs[2]}"
for job in "${jobs[@]}"; do expect "job $job" "$(state "$job"), $(restarts "$job") restarts" "COMPLETED, 0 restarts"; done

say "2. disturbed"
stages disturbed
wait_until 900 "step 5 of stage 1" has_step "$folder/disturbed/1_global_caption" 5
sbatch --partition=high --nodes=64 --exclusive --output=/dev/null --wrap 'sleep 3' >/dev/null
say "job ${jobs[0]} is preempted by a job for all nodes"
wait_until 900 "step 6 of stage 2" has_step "$folder/disturbed/2_multi_event" 6
victim=$(scontrol listpids "${jobs[1]}" n1 | awk '$3 == 1 || $4 == 0 {print $1}' | head -n 1)
victim=${victim:-$(sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$folder/disturbed/2_multi_event/heartbeats/rank_00001.json")}
say "job ${jobs[1]}: kill -9 of rank 1, $(tr '\0' ' ' <"/proc/$victim/cmdline" | grep -o 'train.run_stage')"
kill -9 "$victim"
wait_until 900 "step 6 of stage 3" has_step "$folder/disturbed/3_continuation" 6
touch "$folder/disturbed/3_continuation/save_quit"
say "job ${jobs[2]}: touch save_quit"
wait_until 300 "the job to be held" is_in_state "${jobs[2]}" PENDING
expect "why job ${jobs[2]} waits" "$(squeue -h -j "${jobs[2]}" -o %r)" "job requeued in held state"
scontrol release "${jobs[2]}"
wait_until 900 "the disturbed stages" has_ended "${jobs[2]}"
for job in "${jobs[@]}"; do expect "job $job" "$(state "$job"), $(restarts "$job") restarts" "COMPLETED, 1 restarts"; done
for job in "${jobs[@]}"; do
    while read -r line; do say "  log of job $job: $line"; done < <(
        grep -hE '^(start|queued again|held|done)' "$folder"/disturbed/*/slurm-"$job".log
    )
done

say "3. bits"
expect "files in the last checkpoints" "$(bits undisturbed | wc -l)" "$(bits disturbed | wc -l)"
expect "their bits" "$(bits disturbed | sha256sum)" "$(bits undisturbed | sha256sum)"
[ "$(bits undisturbed | wc -l)" -ge 9 ] || expect "at least weights, averages and moments of three stages" no yes

say "4. a wrong setting"
slurm/all_stages.sh "$folder/wrong" -N 2 --ntasks-per-node=1 -- model=tiny optimizer.learning_rate=1 \
    data.dataset="$folder/stories" trainer.accelerator=cpu >"$folder/submitted"
mapfile -t jobs < <(sed -n 's/.*: job \([0-9]*\).*/\1/p' "$folder/submitted")
wait_until 900 "the last job" has_ended "${jobs[2]}"
expect "job ${jobs[0]}" "$(state "${jobs[0]}"), $(restarts "${jobs[0]}") restarts" "FAILED, 0 restarts"
expect "job ${jobs[1]}" "$(state "${jobs[1]}")" CANCELLED
expect "job ${jobs[2]}" "$(state "${jobs[2]}")" CANCELLED
say "  $(grep -h 'a person must look' "$folder"/wrong/*/slurm-*.log)"

say "5. the production header on 64 nodes"
exported=PYTHON,PYTHONPATH,OMP_NUM_THREADS,DS_ACCELERATOR # srun must hand on what env.sh sets all the same
job=$(sbatch --parsable --nodes=64 --export=$exported --output="$folder/dry.log" slurm/train_stage.sbatch experiment=story_world \
    strategy=zero2 data.dataset="$folder/stories" data.clips_per_batch=1024 run_dir="$folder/dry" --dry-run)
wait_until 900 "the dry run" has_ended "$job"
expect "job $job" "$(state "$job")" COMPLETED
expect "ranks" "$(wc -l <"$folder/dry/slurm/job_$job/start_0/ranks.jsonl")" 512
while read -r line; do say "  $line"; done < <(grep -vE '^  n([3-9]|[1-5][0-9]|6[0-2]):' "$folder/dry.log")

say "$failures failures"
if [ -n "$log" ]; then cp "$folder/log.txt" "$log"; fi
if [ $failures != 0 ]; then tail -n 40 "$folder"/*/*/slurm-*.log "$folder/dry.log"; fi
exit $failures

#!/bin/bash
# Submits the three stages, each to begin with the weights of the one before when that has ended well.
#
#   slurm/all_stages.sh runs/story -N 8 -p gpu -- model=wan-1.3b cluster=zero2 data.dataset=DATASET \
#     data.clips_per_batch=256 data.max_tokens=172800
#
# Words before -- go to sbatch, words after it to train/run_stage.py. Prints the jobs. A stage that has done its steps
# is not run again, so the same line goes on after a failure; one that ends in an error takes the later ones along.
set -eu

if [ $# -lt 1 ] || [[ $1 == -* ]] || [[ $1 == *=* ]]; then
    echo "error: expected a folder for the three runs first, e.g. slurm/all_stages.sh runs/story -N 8 -- model=tiny" >&2
    exit 1
fi
root=${STORYANCHORS_ROOT:-$PWD} # where the jobs will look
if [ ! -f "$root/train/run_stage.py" ]; then
    echo "error: found no train/run_stage.py in $root: submit from the folder of storyanchors" >&2
    exit 1
fi
runs=$1
shift
sbatch_options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    sbatch_options+=("$1")
    shift
done
if [ $# = 0 ]; then
    echo "error: expected -- and then the settings of train/run_stage.py, e.g. -- model=tiny data.dataset=DATASET" >&2
    exit 1
fi
shift

# steps_of RUN_DIR SETTING...: how many steps the stage has: as set now, else as it was started; empty for a new one.
steps_of() {
    local run_dir=$1 steps='' setting
    [ -f "$run_dir/config.yaml" ] && steps=$(sed -n '/^stage:/,/^[^ ]/s/^  steps: //p' "$run_dir/config.yaml")
    shift
    for setting in "$@"; do
        case $setting in stage.steps=*) steps=${setting#stage.steps=} ;; esac
    done
    echo "$steps"
}

before='' init_from=()
number=0
for stage in global_caption multi_event continuation; do
    number=$((number + 1))
    run_dir=$runs/${number}_$stage
    steps=$(steps_of "$run_dir" "$@")
    if [ -n "$steps" ] && [ -f "$run_dir/checkpoints/$(printf 'step_%08d' "$steps")/MANIFEST.json" ]; then
        echo "$stage: done, $steps steps in $run_dir"
    else
        mkdir -p "$run_dir"
        depends=()
        [ -n "$before" ] && depends=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
        before=$(sbatch --parsable --job-name="$stage" --output="$run_dir/slurm-%j.log" "${sbatch_options[@]}" \
            "${depends[@]}" "$(dirname "$0")/train_stage.sbatch" \
            "stage=$stage" "run_dir=$run_dir" "${init_from[@]}" "$@")
        before=${before%%;*} # on a federation: JOB;CLUSTER
        echo "$stage: job $before${depends:+ after job ${depends[0]##*:}}, $run_dir"
    fi
    init_from=("init_from=$run_dir")
done

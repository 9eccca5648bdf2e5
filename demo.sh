#!/usr/bin/env bash
# The main job from end to end, small: videos -> shards -> three training stages -> story frames. `make demo` runs it.
# Everything lands in runs/demo; steps that are finished are not repeated.
set -euo pipefail
cd "$(dirname "$0")"
run=runs/demo
export OMP_NUM_THREADS=1
say() { printf '\n== %s\n' "$*"; }
# bfloat16 products are five times as fast as float32 on a CPU that has them, and far slower on one that has not
has_bf16='import torch; print("bf16-mixed" if torch.cpu._is_avx512_bf16_supported() else "32-true")'
precision=$(python -c "$has_bf16")
started=$SECONDS

say "a real film clip: 720 frames of video -> 11 story frames, with the story that a person wrote for them"
python data_pipeline/sample_frames.py videos=examples/videos out=$run/film frame_interval=69
python data_pipeline/build_index.py dataset=$run/film captions=by_hand stories=examples/videos

say "videos of the story world -> story frames"
[ -d $run/videos ] || python data_pipeline/write_story_world.py out=$run/videos num_stories=4 seed=7 videos=true
python data_pipeline/sample_frames.py videos=$run/videos out=$run/video_clips frame_interval=69
python data_pipeline/build_index.py dataset=$run/video_clips captions=truth stories=$run/videos

say "2000 labelled stories of the story world to train on"
python data_pipeline/write_story_world.py out=$run/stories num_stories=2000

train() { # NAME STAGE STEPS [OVERRIDES]
    local name=$1 stage=$2 steps=$3
    shift 3
    python train/run_stage.py experiment=story_world stage="$stage" stage.steps="$steps" data.dataset=$run/stories \
        run_dir=$run/"$name" trainer.precision="$precision" samples.every_n_steps=0 "$@"
    [ -d $run/models/"$name" ] || python train/export_weights.py run_dir=$run/"$name" out=$run/models/"$name"
}
score() { # NAME OVERRIDES: 16 held-out stories
    local name=$1
    shift
    [ -f $run/scores/"$name".json ] ||
        python infer/score_story_world.py num_stories=16 num_steps=10 out=$run/scores/"$name".json "$@" >/dev/null
}

say "the network as it is before training (one step with learning rate 0), to compare with"
train untrained global_caption 1 optimizer.lr=0
score untrained weights=$run/models/untrained
say "stage 1: global captions"
train stage1 global_caption 200 optimizer.final_lr_scale=1
score stage1 weights=$run/models/stage1
say "stage 2: multi-event captions"
train stage2 multi_event 500 init_from=$run/stage1 optimizer.final_lr_scale=1
score stage2 weights=$run/models/stage2
score stage2_continue weights=$run/models/stage2 mode=continue
say "stage 3: continuation from given frames"
train stage3 continuation 300 init_from=$run/stage2 stage.lr_scale=1 optimizer.decay_share=0.6
score stage3 weights=$run/models/stage3
score stage3_continue weights=$run/models/stage3 mode=continue

say "from the numbered prompt alone, 16 held-out stories"
python infer/compare_scores.py scores=[$run/scores/untrained.json,$run/scores/stage1.json,$run/scores/stage2.json,$run/scores/stage3.json]
say "continued from the first frame; generated frames only"
python infer/compare_scores.py scores=[$run/scores/stage2_continue.json,$run/scores/stage3_continue.json]

tell() { # MODEL OUT: continues a story from its first frame, then edits frame 6 and holds the others fixed
    python infer/continue_story.py weights="$1" story=examples/story_world/two_friends.story.yaml \
        frames=examples/story_world/first_frame keep=[1] fps=24 frame_interval=69 out="$2"/continued
    python infer/continue_story.py weights="$1" story=examples/story_world/two_friends_edited.story.yaml \
        frames="$2"/continued keep=[1,2,3,4,5,7,8] fps=24 frame_interval=69 out="$2"/edited
}
say "a story, continued from its first frame, then its frame 6 edited: by the model that was trained just now"
tell $run/models/stage3 $run/told
say "the same by the model that comes with the repository (examples/story_world_model: trained for 18,700 steps)"
tell examples/story_world_model $run/told_by_shipped_model

say "done in $(((SECONDS - started + 59) / 60)) minutes; look at"
ls $run/told*/*/contact_sheet.png

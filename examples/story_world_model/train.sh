#!/usr/bin/env bash
# How the weights in this folder were made, on 2 CPU cores. Run it from the repository root, in its environment.
set -euo pipefail
run=runs/story_world_model
export OMP_NUM_THREADS=1
python data_pipeline/write_story_world.py out=$run/stories num_stories=20000
train() { # STAGE STEPS NAME [OVERRIDES]
    python train/run_stage.py experiment=story_world stage="$1" stage.steps="$2" run_dir=$run/"$3" \
        data.dataset=$run/stories trainer.precision=bf16-mixed samples.every_n_steps=0 log_every_n_steps=50 "${@:4}"
}
train global_caption 200 stage1 optimizer.final_lr_scale=1
train multi_event 2600 stage2 init_from=$run/stage1 stage.other_caption_share=0.05 optimizer.final_lr_scale=1
train continuation 1500 stage3 init_from=$run/stage2 stage.other_caption_share=0.05 stage.lr_scale=1 \
    optimizer.decay_share=0.6
train continuation 5800 stage4 init_from=$run/stage3 stage.other_caption_share=0.05 stage.lr_scale=1 \
    optimizer.decay_share=0.2666
python train/export_weights.py run_dir=$run/stage4 out=$run/model dtype=bfloat16 num_steps=12 guidance_scale=2

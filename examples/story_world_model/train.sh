#!/usr/bin/env bash
# How the weights in this folder were made, on 2 CPU cores. Run it from the repository root, in its environment.
set -euo pipefail
run=runs/story_world_model
export OMP_NUM_THREADS=1
write() { python data_pipeline/write_story_world.py out=$run/"$1" num_stories="$2" "${@:3}"; }
write stories 20000
write anonymous 10000 clips=anonymous
write anonymous2 16000 clips=anonymous seed=5
write dense 6000 clips=dense seed=3
train() { # STAGE STEPS NAME [OVERRIDES]
    python train/run_stage.py experiment=story_world stage="$1" stage.steps="$2" run_dir=$run/"$3" \
        trainer.precision=bf16-mixed samples.every_n_steps=0 log_every_n_steps=50 "${@:4}"
}
stories="data.dataset=$run/stories"
mix() { # SHARES of stories, of anonymous ones, of dense clips, and the folder of the anonymous ones
    echo "data.mix=[{dataset:$run/stories,weight:$1},{dataset:$run/$4,weight:$2},{dataset:$run/dense,weight:$3}]"
}
train global_caption 200 stage1 "$stories" optimizer.final_lr_scale=1
train multi_event 2600 stage2 "$stories" init_from=$run/stage1 stage.other_caption_share=0.05 optimizer.final_lr_scale=1
train continuation 1500 stage3 "$stories" init_from=$run/stage2 stage.other_caption_share=0.05 stage.lr_scale=1 \
    optimizer.decay_share=0.6
train continuation 5800 stage4 "$stories" init_from=$run/stage3 stage.other_caption_share=0.05 stage.lr_scale=1 \
    optimizer.decay_share=0.2666
# films and looks that only pictures tell: docs/film.md, docs/steering.md
train continuation 2800 stage5 "$(mix 4 3.5 2.5 anonymous)" init_from=$run/stage4 stage.other_caption_share=0.05 \
    stage.lr_scale=0.8 optimizer.decay_share=0.5 "stage.dense_mask_policies=[{name:first_last}]"
given="[{name:none,weight:1},{name:first,weight:2},{name:suffix,weight:2},{name:first_last,weight:1},"
given+="{name:random_subset,p:0.4,weight:3},{name:all_but,weight:1}]"
train continuation 5800 stage6 "$(mix 2 7 1 anonymous2)" init_from=$run/stage5 stage.other_caption_share=0.05 \
    stage.lr_scale=1 optimizer.decay_share=0.4 model.sigma_shift=12 "stage.dense_mask_policies=[{name:first_last}]" \
    "stage.mask_policies=$given"
python train/export_weights.py run_dir=$run/stage6 out=$run/model dtype=bfloat16 num_steps=8 guidance_scale=2 shift=8 max_frames=8

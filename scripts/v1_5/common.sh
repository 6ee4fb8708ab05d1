# Shared by the training scripts beside it (sourced, not run): settings, the recipes' common flags, the launcher.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# As CUDA counts: those listed, up to the first that is none (-1, or the empty list that hides them all).
count_gpus() {
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        { nvidia-smi -L 2>/dev/null || true; } | wc -l
        return
    fi
    local names name count=0
    IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
    for name in "${names[@]}"; do
        [[ -n $name && $name != -* ]] || break
        ((++count))
    done
    echo "$count"
}

VISIBLE_GPUS=$(count_gpus)
setting PYTHON python python "the Python to run"
setting GPUS "$VISIBLE_GPUS" "$VISIBLE_GPUS" "processes on this machine; default: the visible GPUs, 0 runs on the CPU"
setting NNODES 1 1 "machines; with more than one, start the script on each with NODE_RANK and MASTER_ADDR"
setting NODE_RANK 0 0 "number of this machine"
setting MASTER_ADDR 127.0.0.1 127.0.0.1 "first machine"
setting MASTER_PORT 29500 29500 "port on the first machine"
setting HOSTFILE "" "" "DeepSpeed's hostfile, instead of NNODES: started once, it reaches the machines by ssh"
setting REDUCER "" prumerge "visual token reducer: prumerge+, prumerge+(ratio=0.125), none; empty: the checkpoint's, else none"
setting TOWER openai/clip-vit-large-patch14-336 checkpoints/mini-base/vision_tower "vision tower"
setting SAVE_STEPS 500 2 "optimizer steps between checkpoints to resume from"
setting REPORT_TO none none "tensorboard, wandb or none; log.jsonl is always written"
setting DRY_RUN "" "" "1: print the command and stop"

# launch RECIPE_FLAGS "$@": run the training of MODEL on DATA and IMAGES into OUT, with what the scripts have in common.
launch() {
    if asks_for_help "$@"; then
        usage "1: the small model on composed scenes, a few steps, on any machine" \
            "Arguments are flags of \`llava train\` and win over the recipe: $0 --learning_rate 1e-4"
        exit 0
    fi
    [[ -z $MINI || -n $DRY_RUN ]] || prepare_mini

    local command=("$PYTHON") common=(
        --model_name_or_path "$MODEL"
        --vision_tower "$TOWER"
        --data_path "$DATA"
        --image_folder "$IMAGES"
        --output_dir "$OUT"
        --mm_projector_type mlp2x_gelu
        --mm_vision_select_layer -2
        --mm_use_im_start_end False
        --mm_use_im_patch_token False
        --precision auto
        --num_train_epochs 1
        --per_device_train_batch_size "$PER_DEVICE"
        --global_batch_size "$GLOBAL_BATCH"
        --per_device_eval_batch_size 4
        --eval_strategy no
        --save_strategy steps
        --save_steps "$SAVE_STEPS"
        --save_total_limit 1
        --weight_decay 0.
        --warmup_steps 0.03
        --lr_scheduler_type cosine
        --logging_steps 1
        --model_max_length 2048
        --gradient_checkpointing True
        --dataloader_num_workers 4
        --lazy_preprocess True
        --report_to "$REPORT_TO"
    )
    [[ -z $REDUCER ]] || common+=(--mm_token_reducer "$REDUCER")
    if [[ -n $MINI ]]; then
        common+=(--max_steps 4 --dataloader_num_workers 0)
    fi
    if [[ -n $HOSTFILE ]]; then
        command=(deepspeed --hostfile "$HOSTFILE" --master_port "$MASTER_PORT")
    elif ((GPUS > 0)); then
        command+=(-m torch.distributed.run --nproc_per_node "$GPUS" --nnodes "$NNODES"
            --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    fi
    if ((GPUS > 0)) || [[ -n $HOSTFILE ]] && [[ $DEEPSPEED != none ]]; then
        common+=(--deepspeed "$DEEPSPEED")
    fi
    command+=(llava/train/train_mem.py "${common[@]}" "$@")
    if [[ -n $DRY_RUN ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}

# The small model and a few scenes to train it on, made here where they are not there yet.
prepare_mini() {
    [[ -e checkpoints/mini-base ]] || "$PYTHON" -m llava.cli mini prepare
    [[ -e $DATA ]] || "$PYTHON" -m llava.cli mini world --split train --n 64 --out "$(dirname "$DATA")"
}

MINI_DATA=playground/data/mini

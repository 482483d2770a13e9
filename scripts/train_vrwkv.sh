#!/usr/bin/env bash
# Train Vision-RWKV, or a ViT beside it, to tell classes of pictures apart. MODEL: a preset such as vrwkv_t, vit_nano, a name of timm's or
# a trained encoder; DATA: a directory of pictures for each class, or a Hugging Face data set (without: digits); OUT: the run. Options go on.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
MODEL=${MODEL:-vrwkv_nano}
if [[ -z "${DATA:-}" ]]; then
    DATA=runs/digits
    python -m visualrwkv.training.digits --out "$DATA"
    set -- --preset digits "$@"
fi
exec python -m visualrwkv.training.classify --model "$MODEL" --data "$DATA" --out "${OUT:-runs/$(basename "$MODEL")-$(basename "$DATA")}" "$@"

#!/usr/bin/env bash
# Stage 2: train projector and RWKV of MODEL on conversations about pictures; embedding and encoder stay frozen.
# DATA: LLaVA JSON; IMAGES: what its picture paths are relative to; OUT: the run; RANKS: processes. Further options go on.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
made=runs/quickstart
DATA=${DATA:-$made/data/train.json}
exec "${LAUNCH[@]}" visualrwkv.training --stage finetune --model "${MODEL:-$made/finetune}" \
    --data "$DATA" --images "${IMAGES:-$(dirname "$DATA")}" --out "${OUT:-runs/finetune-$(basename "$DATA" .json)}" "$@"

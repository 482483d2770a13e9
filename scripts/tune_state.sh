#!/usr/bin/env bash
# State tuning: learn what MODEL remembers before the first word, and nothing of MODEL itself; OUT/state.safetensors is the task.
# DATA: LLaVA JSON; IMAGES: what its picture paths are relative to; OUT: the run; RANKS: processes. Further options go on.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
made=runs/quickstart
DATA=${DATA:-$made/data/train.json}
exec "${LAUNCH[@]}" visualrwkv.training --stage state --model "${MODEL:-$made/finetune}" \
    --data "$DATA" --images "${IMAGES:-$(dirname "$DATA")}" --out "${OUT:-runs/state-$(basename "$DATA" .json)}" "$@"

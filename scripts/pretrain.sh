#!/usr/bin/env bash
# Stage 1: compose a language model (LM) and a vision encoder (VISION), train the projector alone.
# DATA: LLaVA JSON; IMAGES: what its picture paths are relative to; OUT: the run; RANKS: processes. Further options go on.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
made=runs/quickstart
DATA=${DATA:-$made/data/train.json}
exec "${LAUNCH[@]}" visualrwkv.training --stage pretrain --lm "${LM:-$made/language}" --vision "${VISION:-$made/encoder}" \
    --data "$DATA" --images "${IMAGES:-$(dirname "$DATA")}" --out "${OUT:-runs/pretrain-$(basename "$DATA" .json)}" "$@"

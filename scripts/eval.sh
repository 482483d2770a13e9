#!/usr/bin/env bash
# Score MODEL on BENCH (one or several of eval/benches, with commas) by the files in DATA, or by the Hub's without it; by default
# the quickstart's on scenes.
# RANKS: processes, by default one for each GPU. Further options go on to eval/run.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
BENCH=${BENCH:-scenes}
[[ $BENCH == scenes ]] && DATA=${DATA:-runs/quickstart/data}
LAUNCH=(python)
(( RANKS > 1 )) && LAUNCH=(torchrun --standalone --nproc-per-node "$RANKS")
exec "${LAUNCH[@]}" eval/run.py --bench "$BENCH" --model "${MODEL:-runs/quickstart/finetune}" \
    ${DATA:+--data "$DATA"} "$@"

#!/usr/bin/env bash
# Train a Vision-RWKV encoder to find things (TASK=detect, under Mask R-CNN) or to name every pixel (TASK=segment, under UperNet).
# VISION: the encoder; DATA: a directory with train.json and test.json in COCO's format; OUT: the run. Further options go on.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
TASK=${TASK:-detect}
[[ "${DATA:-}" ]] || python -m visualrwkv.training.scene_masks --out "${DATA:=runs/dense/data}"
exec python -m visualrwkv.training.dense --task "$TASK" --vision "${VISION:-runs/quickstart/encoder}" \
    --data "$DATA" --out "${OUT:-runs/dense/$TASK}" "$@"

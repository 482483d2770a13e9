#!/usr/bin/env bash
# The main job: from nothing to a small VisualRWKV that answers questions about pictures. `--fresh` starts over.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m visualrwkv.training.quickstart "$@"

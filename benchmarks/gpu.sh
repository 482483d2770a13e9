#!/usr/bin/env bash
# Builds, checks and times every CUDA kernel on this machine's GPU, and a training step; results in benchmarks/results/<gpu>/ (and OUT, if set).
# flash-linear-attention is measured beside ours where it can be imported. Needs nvcc and a CUDA torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
"$PYTHON" -m visualrwkv.ops.build
"$PYTHON" benchmarks/gpu.py check
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # The caching allocator would hide an access past a tensor's end.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 \
            "$PYTHON" benchmarks/gpu.py touch
    done
else
    echo "compute-sanitizer is not here: its checks are left out" >&2
fi
"$PYTHON" benchmarks/gpu.py time "$@"
"$PYTHON" benchmarks/gpu_training.py
[[ -z "${OUT:-}" ]] || cp benchmarks/results/*/{kernels*,training*} "$OUT"/

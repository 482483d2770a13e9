#!/usr/bin/env bash
# Lint, type check and tests. Options go on to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2
echo "lint"; ruff check . && ruff format --check .
echo "type check"; mypy
echo "tests"; python -m pytest -n "$(nproc)" --dist loadgroup "$@"

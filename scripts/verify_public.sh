#!/usr/bin/env bash
# Fetch a public file ("name/model:file" on the Hub, or a path), check its hash, open it strictly, compare its language model with
# the `rwkv` package, and ask three questions about a picture. Prints the line for docs/models.md.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python benchmarks/verify_public.py "$@"

#!/usr/bin/env bash
# Score MODEL on the bench `scenes` with the data in DATA. Further options go on to eval/run.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python eval/run.py --bench scenes --model "${MODEL:-runs/quickstart/finetune}" --data "${DATA:-runs/quickstart/data}" "$@"

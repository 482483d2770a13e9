#!/usr/bin/env bash
# A chat about pictures in the browser, with MODEL; by default with what the quickstart made. Further options go to demo/app.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export GRADIO_ANALYTICS_ENABLED=False
exec python -m demo.app --model "${MODEL:-runs/quickstart/finetune}" "$@"

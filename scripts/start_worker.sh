#!/bin/sh
# Start a worker on Linux or macOS; every option of `toolkit worker` works here as well.
#
#   scripts/start_worker.sh                                 serve TOOLKIT_MODEL
#   scripts/start_worker.sh --model vit_base_patch16_224 --devices cuda:0
#   REDIS_HOST=10.0.0.5 scripts/start_worker.sh             the server is elsewhere
#
# It takes the toolkit of the active environment, else that of .venv beside this folder.
# Ctrl-C stops the worker once its batch is done. docs/workers.md tells the rest.
set -eu

toolkit="$(command -v toolkit || echo "$(dirname "$0")/../.venv/bin/toolkit")"
if [ ! -x "$toolkit" ]; then
    echo "error: no toolkit in this environment; activate the one that has it (conda activate" \
        "image-index-toolkit), or make one: docs/workers.md" >&2
    exit 2
fi
# exec: a signal reaches the worker's supervisor, not this shell.
exec "$toolkit" worker "$@"

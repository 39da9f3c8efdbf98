#!/bin/sh
# Start Flower for this toolkit's workers; every option of `toolkit flower` works here as well.
#
#   scripts/start_flower.sh                                 http://127.0.0.1:5555
#   scripts/start_flower.sh --port 5556
#   REDIS_HOST=10.0.0.5 scripts/start_flower.sh             the server is elsewhere
#
# It takes the toolkit of the active environment, else that of .venv beside this folder.
# It is read-only and listens on this machine alone. Ctrl-C stops it.
set -eu

toolkit="$(command -v toolkit || echo "$(dirname "$0")/../.venv/bin/toolkit")"
if [ ! -x "$toolkit" ]; then
    echo "error: no toolkit in this environment; activate the one that has it (conda activate" \
        "image-index-toolkit)" >&2
    exit 2
fi
exec "$toolkit" flower "$@"

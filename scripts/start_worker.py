#!/usr/bin/env python3
"""Start a worker on this machine; every option of `toolkit worker` works here as well.

    python scripts/start_worker.py                          serve TOOLKIT_MODEL
    python scripts/start_worker.py --model vit_base_patch16_224 --devices cuda:0
    REDIS_HOST=10.0.0.5 python scripts/start_worker.py      the server is elsewhere

Ctrl-C stops it once its batch is done. docs/workers.md tells the rest.
"""

import sys

from toolkit.cli import main

if __name__ == "__main__":
    main(["worker", *sys.argv[1:]])

#!/usr/bin/env python3
"""Start Flower for this toolkit's workers; every option of `toolkit flower` works here as well.

    python scripts/start_flower.py                          http://127.0.0.1:5555
    python scripts/start_flower.py --port 5556
    REDIS_HOST=10.0.0.5 python scripts/start_flower.py      the server is elsewhere

It is read-only and listens on this machine alone. Ctrl-C stops it.
"""

import sys

from toolkit.cli import main

if __name__ == "__main__":
    main(["flower", *sys.argv[1:]])

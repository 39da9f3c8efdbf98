#!/usr/bin/env python3
"""Check a live set-up of server and workers, and print a report that can be pasted.

    python scripts/verify_distributed.py                    build from sample photos
    python scripts/verify_distributed.py cats dogs          build from your own datasets
    python scripts/verify_distributed.py --json             for programs

The same as `toolkit verify`. Your indexes are not touched. Exit code 0 when nothing failed.
"""

import sys

from toolkit.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])

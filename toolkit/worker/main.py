"""The process of one Celery worker, as its supervisor starts it.

A plain ``celery -A toolkit worker`` is the same, found through the working directory.
"""

from __future__ import annotations

import sys

from toolkit.cluster.app import worker_app

if __name__ == "__main__":  # a pool's process imports this module again
    worker_app().worker_main(["worker", *sys.argv[1:]])

"""`crayon run`, in a process that ends with its standard input: when whoever started it is gone, whatever ended that."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from crayon_runtime.cli import main

STOP_SECONDS = 10.0
"""What is still being answered has so long to end."""


def _follow() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_follow, daemon=True).start()
    sys.exit(main(["run", *sys.argv[1:]]))

"""A script that keeps a core busy in pure Python until it is killed or its parent, which holds its stdin, is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """Reading ends when the kernel closes the other end, however the parent ended."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent too, which then ends this process
    threading.Thread(target=end_with_parent, daemon=True).start()
    print("spinning", flush=True)
    while True:
        pass


if __name__ == "__main__":
    main()

"""What worker processes do when they start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def start_worker(worker: int, workers: int) -> None:
  """Runs in each worker: leave signals to the parent, and never outlive it (pools' workers would, after a kill)."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm tells all processes of a job; the parent needs us to stop well
  parent = multiprocessing.parent_process()

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, name=f'watch-parent-{worker}-of-{workers}', daemon=True).start()

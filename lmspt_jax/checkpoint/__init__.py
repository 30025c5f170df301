"""Checkpoints of a run: one named composite per step, written in the background. The only room that knows Orbax.

A checkpoint holds `state` (the train state's arrays), and `record`, JSON: data position, config, teacher id, the best
step so far, alarms. Orbax writes to a temporary folder and renames it, so what can be listed is whole; what a process
that was killed has left half-written is removed by the next one.
"""

from lmspt_jax.checkpoint.best import Best
from lmspt_jax.checkpoint.saved import RestoredModel, SavedRun, restore_for_inference, run_and_which, saved_run
from lmspt_jax.checkpoint.store import FOLDER, CheckpointStore, has_checkpoint, read, write

__all__ = ['FOLDER', 'Best', 'CheckpointStore', 'RestoredModel', 'SavedRun', 'has_checkpoint', 'read',
           'restore_for_inference', 'run_and_which', 'saved_run', 'write']

"""Several processes ("hosts") that train as one: how they find each other, agree, and end together.

Every host does the same device work, host 0 alone writes files. What all must know of each other at every step (stop
requests, records that can't be used) travels through an `Exchange` on the devices; what is rare travels as text
through JAX's coordination service (`gather`). A host that fails tells the others why; one that says nothing any more
is taken for lost, and the others leave with EXIT_RESUME instead of waiting for it in a collective for ever.
"""

from lmspt_jax.hosts.agreement import Exchange, check_same, gather, is_writer, told_by_writer, whole_batch
from lmspt_jax.hosts.joining import fail, start

__all__ = ['Exchange', 'check_same', 'fail', 'gather', 'is_writer', 'start', 'told_by_writer', 'whole_batch']

"""`python -m lmspt_jax VERB` is `lmspt VERB`."""

import sys

from lmspt_jax.cli.main import main

if __name__ == '__main__':
  sys.exit(main())

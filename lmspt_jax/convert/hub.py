"""Files from the Hugging Face hub, by way of huggingface_hub and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmspt_jax.errors import LmsptError

SCHEME = 'hf://'


def fetch(uri: str, wanted: Sequence[str], way_out: str) -> Path:
  """A repository's folder in the cache, with the files in it that are wanted and there.

  What the cache holds is not fetched again; without a network, or with HF_HUB_OFFLINE=1, it is all there is. The
  folder is named after the commit that was found.

  Args:
    uri: hf://org/name[@revision]; a revision is a branch, a tag or a commit.
    wanted: patterns of file names.
    way_out: for messages: what to give instead.

  Raises:
    LmsptError: it can't be fetched, or huggingface_hub is missing.
  """
  try:
    import huggingface_hub
  except ImportError as error:
    raise LmsptError(f"{uri}: needs huggingface_hub: pip install 'lmspt_jax[hub]', or {way_out}") from error
  repository, _, revision = uri.removeprefix(SCHEME).partition('@')
  try:
    return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(wanted)))
  # Its errors for HTTP and for a missing cache are OSErrors, for a malformed name ValueErrors.
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise LmsptError(f'{uri}: cannot be fetched ({reason}); or {way_out}') from error

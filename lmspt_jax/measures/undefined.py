"""What a metric raises where it has no value."""


class Undefined(Exception):
  """There is no such number for this recording; the text says why. It is counted as missing."""

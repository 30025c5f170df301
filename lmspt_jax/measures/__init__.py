"""What is measured of a recording and of codes, for `lmspt evaluate` and for training's held-out evaluation alike."""

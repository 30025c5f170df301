"""Speech language models' side of a tokenizer: corpora of tokens, their vocabulary, and layouts to train on.

Nothing here but `corpus` and `verification` loads jax, so data workers can unpack and lay out tokens.
"""

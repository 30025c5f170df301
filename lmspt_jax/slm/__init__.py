"""Speech language models' side of a tokenizer: corpora of tokens, their vocabulary, and layouts to train on.

Reading needs no jax (`manifest`, `token_rows`, `vocabulary`, `packing`), so data workers can unpack and lay out tokens.
"""

"""Text to packed rows, once, and the prepared folder that every run reads.

    source -> documents -> [train | val | holdout] -> BPE tokenizer (from train only) -> rows of seq_len + 1 tokens

`readers` knows files, `sources` where text comes from, `spool` which document falls into which split, `tokenizer`,
`packing` and `copies` what is done with it, `building` does it, `dataset` is what is read afterwards.
"""

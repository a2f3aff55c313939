"""A transformer block: norm with QKV, the residual stream, the MLP."""

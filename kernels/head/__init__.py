"""Both ends of a model: embedding tables, and lm_head with its cross-entropy."""

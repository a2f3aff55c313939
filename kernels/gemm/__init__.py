"""Products: one main loop with small epilogues, and the gradients of weights."""

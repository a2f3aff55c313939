"""The optimizers' steps: AdamW over all groups in one launch, and Muon by banks."""

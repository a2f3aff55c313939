"""Validation bits per byte: two evaluators, the audit of one by the other, and scores with their noise."""

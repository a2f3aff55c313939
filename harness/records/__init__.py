"""What is kept of a night: entries in a chain, signed; the seal of what must not change."""

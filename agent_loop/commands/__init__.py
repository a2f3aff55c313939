"""The commands of `hotloop` that are about a night."""

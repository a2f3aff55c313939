"""The compile gate: kernels, and the whole step, compiled for cards that are not there."""

"""Which implementation and which configuration is fastest: searches that can be ended and gone on with."""

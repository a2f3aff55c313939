"""The sandbox of every process that runs an agent's code: how it is built, entered, tried and ended."""

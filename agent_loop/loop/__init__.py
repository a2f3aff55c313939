"""The night as it runs: the driver, an agent's turn, and what is shown of both."""

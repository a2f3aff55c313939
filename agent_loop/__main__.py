"""`python -m agent_loop ...` is `hotloop ...`."""

from __future__ import annotations

import sys

from agent_loop.cli import main

if __name__ == "__main__":
    sys.exit(main())

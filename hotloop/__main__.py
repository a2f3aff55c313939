"""`python -m hotloop ...` is `hotloop ...`."""

import sys

from hotloop.agent_loop.cli import main

if __name__ == "__main__":
    sys.exit(main())

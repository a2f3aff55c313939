"""For all tests: no property fails because the machine is busy, and nothing is written to the user's home."""

from __future__ import annotations

import os
import tempfile

from hypothesis import HealthCheck, settings

_STATE = tempfile.TemporaryDirectory(prefix="hotloop-state-")
os.environ["HOTLOOP_STATE"] = _STATE.name  # of this run of the tests, in the processes that they start too

settings.register_profile("hotloop", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("hotloop")

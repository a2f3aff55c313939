"""What a compiled kernel needs of a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

__all__ = ["resources"]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a thread, from the compiler's own report."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}

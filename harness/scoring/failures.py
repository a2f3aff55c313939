"""What may be repeated of an evaluator's failure: it has val text, and whatever it says reaches the next agent.

Before it gets a row it holds nothing that an agent may not know, so all that it says is shown. From then on only the
kind of its exception, from a list, and the line of train.py where it was raised. Its own words stay in evaluate.txt.
"""

from __future__ import annotations

import builtins
import re
from typing import Any

from hotloop.harness.errors import TrialError
from hotloop.harness.text import one_line
from hotloop.harness.training.conditions import is_machines_fault

__all__ = ["failure_of"]

_KINDS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}
_KINDS |= {"OutOfMemoryError", "AcceleratorError", "KernelError", "BackendCompilerFailed", "Unsupported"}
_STATUSES = ("crash", "oom", "nan", "invalid")


def failure_of(message: dict[str, Any], served: bool, lines: int) -> TrialError:
    """The experiment's fault that an `error` message of an evaluator tells.

    Args:
        served: whether it had got a row.
        lines: of train.py.
    """
    status = next((s for s in _STATUSES if s == message.get("status")), "crash")
    said = one_line(str(message.get("reason", "")), 400)
    if served:
        return TrialError(status, f"while evaluating: {_bare(said, lines)}; its words are in evaluate.txt")
    if "Error(s) in loading state_dict" in said:
        status = "invalid"
    return TrialError(status, f"while evaluating: {said}")


def _bare(said: str, lines: int) -> str:
    kind = said.partition(":")[0].partition(" ")[0]
    if said.startswith("TypeError: the model returned"):
        return "TypeError: the model's logits are not [rows, tokens, vocabulary]"
    where = re.search(r" \(train\.py:(\d{1,6})\)$", said)
    line = f" (train.py:{where[1]})" if where and 0 < int(where[1]) <= lines else ""
    broken = " (device lost)" if is_machines_fault(said) else ""  # buys a second try
    return (kind if kind in _KINDS else "an exception") + broken + line

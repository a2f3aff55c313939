"""Everything that decides what to try next: agents, git, decisions, reports, the loop."""

from __future__ import annotations

__all__: list[str] = []

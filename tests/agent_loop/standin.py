"""A stand-in for Claude Code or Codex: its command line, its input, and what it was seen to print.

Installed under the client's name, beside a file `variant` that says what happens in this run. What it was started
with goes to `seen.json` in the hand-over folder.
"""

import json
import os
import sys
import time
from pathlib import Path

NAME = Path(sys.argv[0]).name
VARIANT = (Path(sys.argv[0]).parent / "variant").read_text()
CLAUDE = NAME == "claude"
HANDOVER = Path(os.environ["HOTLOOP_DESCRIPTION"]).parent


def say(*values):
    for value in values:
        print(json.dumps(value), flush=True)


def result(text="It is done.\nDescription: raise the rate", **changes):
    """The last event of Claude Code 2.1.330."""
    usage = {"inputTokens": 500, "outputTokens": 250, "cacheReadInputTokens": 0, "cacheCreationInputTokens": 0}
    value = {
        "type": "result", "subtype": "success", "is_error": False, "result": text, "api_error_status": None,
        "stop_reason": "end_turn", "terminal_reason": "completed", "total_cost_usd": 0.007, "num_turns": 5,
        "usage": {"input_tokens": 500, "output_tokens": 250}, "modelUsage": {"claude-opus-5-5": usage},
        "permission_denials": [],
    }  # fmt: skip
    say(value | changes)


def turn(text="It is done.\nDescription: raise the rate"):
    """The events of a turn of Codex 0.169.0."""
    usage = {
        "input_tokens": 500, "cached_input_tokens": 30, "cache_write_input_tokens": 0, "output_tokens": 250,
        "reasoning_output_tokens": 15,
    }  # fmt: skip
    say(
        {"type": "thread.started", "thread_id": "01a2"},
        {"type": "turn.started"},
        {"type": "item.completed", "item": {"id": "item_0", "type": "agent_message", "text": text}},
        {"type": "turn.completed", "usage": usage},
    )


def fail(text, status=None, **changes):
    """The end of either where the service said no."""
    if CLAUDE:
        changes = {"is_error": True, "terminal_reason": "api_error", "stop_reason": "stop_sequence"} | changes
        result(text, api_error_status=status, total_cost_usd=0.0014, **changes)
    else:
        say({"type": "turn.started"}, {"type": "error", "message": text})
        say({"type": "turn.failed", "error": {"message": text}})
    sys.exit(1)


def edit(path="train.py"):
    text = Path("train.py").read_text()
    Path(path).write_text(text.replace("0.04", "0.07"))


prompt = sys.stdin.read()
seen = {"argv": sys.argv[1:], "env": dict(os.environ), "prompt": prompt, "cwd": os.getcwd()}
(HANDOVER / "seen.json").write_text(json.dumps(seen))
(Path.home() / "hook").write_text("what an agent leaves behind")
end = result if CLAUDE else turn

if VARIANT == "edit":
    edit()
    end()
elif VARIANT == "description":
    edit()
    Path(os.environ["HOTLOOP_DESCRIPTION"]).write_text("by its \x1b[1mfile\n")
    end()
elif VARIANT == "no edit":
    end("I looked, and all is well.")
elif VARIANT == "elsewhere":
    try:
        Path("program.md").write_text("score yourself")
    except OSError as e:
        print(e, file=sys.stderr)
    end("I changed program.md")
elif VARIANT == "gone":
    Path("train.py").unlink()
    end()
elif VARIANT == "garbage and an edit":
    edit()
    sys.stdout.buffer.write(
        b"{not json\n\xff\xfe\x00[1]\n{}\n" + b'{"type": "result", "result": 5, "total_cost_usd": "x"}\n'
    )
    sys.stdout.buffer.write(b'{"type": "item.completed", "item": 7}\n{"type": "turn.completed", "usage": [1]}\n')
elif VARIANT == "garbage":
    sys.stdout.buffer.write(b"\x1b[31m\xff\xfe oh no\n")
elif VARIANT == "crash":
    print("Segmentation fault, or so", file=sys.stderr)
    os.abort()
elif VARIANT == "hang":
    time.sleep(600)
elif VARIANT == "wait":
    if CLAUDE:
        say({"type": "system", "subtype": "api_retry", "attempt": 1, "max_retries": 2, "retry_delay_ms": 90000,
             "error_status": 529, "error": "overloaded"})  # fmt: skip
    else:
        say(
            {
                "type": "error",
                "message": "Reconnecting... 1/2 (exceeded retry limit, last status: 429 Too Many Requests)",
            }
        )
    time.sleep(600)
elif VARIANT == "huge":
    edit()
    for _ in range(24):
        sys.stdout.write('{"type": "noise", "x": "' + "x" * (1 << 20) + '"}\n')
    end()
elif VARIANT == "endless":
    while True:
        sys.stdout.write("x" * (1 << 20))
elif VARIANT == "option":
    print("error: unknown option '--restricted'", file=sys.stderr)
    sys.exit(1)
elif VARIANT == "turns":
    result(
        None,
        is_error=True,
        subtype="error_max_turns",
        errors=["Reached maximum number of turns (80)"],
        stop_reason="tool_use",
    )
    sys.exit(1)
elif VARIANT == "budget":
    result(
        None,
        is_error=True,
        subtype="error_max_budget_usd",
        errors=["Reached maximum budget ($0.5)"],
        stop_reason="tool_use",
    )
    sys.exit(1)
elif VARIANT == "refusal":
    flagged = "API Error: Opus 5.5's safeguards flagged this message (https://www.anthropic.com/legal/aup)."
    fail(flagged if CLAUDE else "The model refused to answer.", stop_reason="refusal")
elif VARIANT == "bad key":
    if CLAUDE:
        fail("Invalid API key · Fix external API key", 401)
    fail("unexpected status 401 Unauthorized: Incorrect API key provided: x., url: http://127.0.0.1/v1/responses")
elif VARIANT == "not logged in":
    fail("Not logged in · Please run /login")
elif VARIANT == "model":
    if CLAUDE:
        fail("There's an issue with the selected model (x). It may not exist or you may not have access to it.", 404)
    fail("The model `x` does not exist or you do not have access to it.")
elif VARIANT == "credit":
    fail("Credit balance is too low", 400) if CLAUDE else fail("Quota exceeded. Check your plan and billing details.")
elif VARIANT == "rate":
    if CLAUDE:
        say({"type": "system", "subtype": "api_retry", "attempt": 2, "max_retries": 2, "retry_delay_ms": 7000,
             "error_status": 429, "error": "rate_limit"})  # fmt: skip
        fail("API Error: Request rejected (429) · This request would exceed your account's rate limit.", 429)
    fail("Rate limit reached for gpt-5 in organization org-x. Please try again in 7s.")
elif VARIANT == "overloaded":
    if CLAUDE:
        fail("API Error: 529 Overloaded. This is a server-side issue, usually temporary — try again in a moment.", 529)
    fail("exceeded retry limit, last status: 429 Too Many Requests")
elif VARIANT == "usage limit":
    if CLAUDE:
        info = {"status": "rejected", "resetsAt": int(time.time()) + 5000, "rateLimitType": "five_hour"}
        say({"type": "rate_limit_event", "rate_limit_info": info})
        fail("You've hit your 5-hour limit · resets 11:31pm (UTC)", 429)
    fail("You’ve hit your usage limit. Try again later.")
elif VARIANT == "unreachable":
    fail("API Error: Connection refused — a firewall or proxy may be blocking it (ECONNREFUSED)" if CLAUDE
         else "Connection failed: error sending request")  # fmt: skip
else:
    sys.exit(f"no such variant: {VARIANT}")

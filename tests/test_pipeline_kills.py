"`dvc repro` killed at random times in every stage: the next one gives the same result."
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from workspace import STAGES, M, Workspace, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by their environment, as Linux shows it"),
]

KILLS = 25

VICTIMS = ("kernel", "runner", "dvc", "group") # root_cause first
MADE = ("dvc.lock", ".dvc/cache", ".runs", "identity", "starts", "data", "models", "results", "comparison", "papermill_runs")
CUT = {
    "dvc.lock": ("dvc.lock' validation failed", "dvc.lock' is invalid", "unable to read: 'dvc.lock'"),
    ".dvc/tmp/rwlock": ("Unable to read RWLock-file",),
}
MARK = "AI2TEXT_KILLS" # in the environment of all processes of a workspace's `dvc repro`
WAIT = 300             # seconds until the processes that were not killed must have ended
# Files that depend on clock, memory or load, and such keys of other files.
CLOCK_FILES = {f"results/{M}/ttq_log.json", f"results/{M}/live/hours.tsv", f"results/{M}-eval/timing.json", "comparison/export_timing.json",
               *(f"papermill_runs/{name}.ipynb" for name in (f"train-{M}", f"evaluate-{M}", "compare", "export"))}
CLOCK_NAMES = {"state.safetensors", "checkpoint.json", "clocks.json", "ttq_log.jsonl", "hours.tsv"} # of a resumable run, in models/runs
CLOCK_KEYS = {"hours", "cost", "memory_bytes", "training_memory", "memory", "real_time_factor", "seconds", "slowest", "claim"}


@dataclass(frozen=True)
class Kill:
    "A kill: stage by the log of dvc, process, signal, and seconds until the last process had ended."
    stage: str
    victim: str
    signal: str
    seconds: float


def processes(root:Path)->dict:
    "The processes of a workspace and their roles."
    found = {}
    for p in psutil.process_iter():
        try:
            if p.environ().get(MARK) != str(root) or p.status() == psutil.STATUS_ZOMBIE: continue
            words = " ".join(p.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied): continue
        found[p] = (
            "runner"
            if "ai2text.pipeline.cli stage" in words
            else "kernel"
            if "kernel_main" in words
            else "dvc"
            if words.endswith("repro") or "dvc repro " in words
            else words[:80]
        )
    return found


class Ended(AssertionError):
    "A `dvc repro` that failed before the kill."


class Repro:
    "A running `dvc repro`."
    def __init__(self, w:Workspace):
        self.root, self.path = w.root, w.root.with_suffix(".log")
        with open(self.path, "w") as log:
            self.process = psutil.Popen(
                ["dvc", "repro"], cwd=w.root, env=environment(PYTHONUNBUFFERED="1", **{MARK: str(w.root)}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
            ) # default handler, which `&` disables

    @property
    def log(self)->str: return self.path.read_text(errors="replace")

    @property
    def stage(self)->str: return ("start", *re.findall(r"^Running stage '(.+)':", self.log, flags=re.M))[-1]

    @property
    def over(self)->bool: return self.process.poll() is not None

    @property
    def worked(self)->float:
        "Processor seconds of it and its children so far, which depend less on the machine's load than time."
        seconds = 0.
        with suppress(psutil.NoSuchProcess):
            for p in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess): seconds += sum(p.cpu_times()[:4])
        return seconds

    def wait(self, holds):
        "Wait for a condition or the end; raises `Ended` if dvc failed."
        while not self.over and not holds(): time.sleep(.1)
        if self.over and self.process.returncode: raise Ended(self.log[-5000:])

    def finish(self)->dict:
        "Wait for the end: processor seconds of each stage."
        marks = []
        def note():
            if not marks or marks[-1][0] != self.stage: marks.append((self.stage, self.worked))
            self.last = self.worked or self.last
        self.last = 0.
        self.wait(note)
        return {stage: end - start for (stage, start), (_, end) in zip(marks, [*marks[1:], ("", self.last)])}

    def kill(self, stage:str, delay:float, victim:str, signum)->Kill:
        "Send a signal `delay` processor seconds into a stage, or into the one that runs instead; None if all ended before."
        order = ("start", *STAGES)
        self.wait(lambda: order.index(self.stage) >= order.index(stage))
        begun = self.worked if stage != "start" else 0.
        self.wait(lambda: self.worked - begun >= delay)
        if self.over: return None
        hit = self.stage
        if victim == "group": os.killpg(self.process.pid, signum)
        else:
            alive = {what: p for p, what in processes(self.root).items()} | dict(dvc=self.process)
            victim = next(v for v in VICTIMS[VICTIMS.index(victim):] if v in alive) # the next one if this process is not running
            with suppress(psutil.NoSuchProcess): alive[victim].send_signal(signum)
        sent = time.monotonic()
        while (left := processes(self.root)) or not self.over:
            if time.monotonic() > sent + WAIT:
                for p in left: p.kill()
                raise AssertionError(
                    f"{victim} got {signal.Signals(signum).name} in {hit}; {WAIT} s later there are "
                    f"{ ({p.pid: what for p, what in left.items()}) }: {self.log[-2000:]}"
                )
            time.sleep(.2)
        return Kill(hit, victim, signal.Signals(signum).name, time.monotonic() - sent)


def remove_truncated(root:Path, message:str)->str:
    "Remove the file that a kill truncated while dvc wrote it, as dvc's message advises: its name; empty for any other failure."
    for name, messages in CUT.items():
        if any(m in message for m in messages):
            (root/name).unlink()
            return name
    return ""


def repro(act, removed:list, w:Workspace):
    "Start `dvc repro`, and again if dvc cannot read one of the two files that it does not write atomically."
    try: return act(Repro(w))
    except Ended as e:
        if not (name := remove_truncated(w.root, str(e))): raise
        print(f"    {name} was truncated: {str(e)[-300:]}", flush=True)
        removed.append(name)
        return act(Repro(w))


def corrupt(root:Path)->list:
    "Objects of the cache whose content differs from their hash."
    cache = root/".dvc/cache/files/md5"
    objects = [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".tmp"] # an unfinished copy has another name
    return [str(p) for p in objects if hashlib.md5(p.read_bytes()).hexdigest() != (p.parent.name + p.name).removesuffix(".dir")]


def timeless(value):
    "A value without the entries that depend on clock or machine."
    if isinstance(value, dict): return {k: timeless(v) for k, v in value.items() if k not in CLOCK_KEYS}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def digest(path:Path)->str:
    "Hash of a file without such entries."
    text = path.read_bytes()
    if path.suffix == ".json": text = json.dumps(timeless(json.loads(text))).encode()
    if path.suffix == ".csv":
        head, *rows = [line.split(",") for line in text.decode().splitlines()]
        text = "\n".join(",".join(v for k, v in zip(head, row) if k not in CLOCK_KEYS) for row in [head, *rows]).encode()
    return hashlib.sha256(text).hexdigest()


def results(root:Path)->dict:
    "Hashes of all files of a pipeline."
    paths = {p.relative_to(root).as_posix(): p for top in MADE[3:] for p in (root/top).rglob("*") if p.is_file()}
    clocks = lambda name, p: name in CLOCK_FILES or name.startswith("models/runs/") and p.name in CLOCK_NAMES
    return {name: "clocks" if clocks(name, p) else digest(p) for name, p in sorted(paths.items())}


def wipe(root:Path):
    "Remove all outputs; .dvc/tmp stays as the last kill left it."
    for name in MADE: shutil.rmtree(root/name) if (root/name).is_dir() else (root/name).unlink(missing_ok=True)


def draw_kills(rng:random.Random, kills:int, spent:dict)->list:
    "(stage, delay, process, signal) of each kill: stages and times uniform, in the pipeline's order."
    stages = list(spent)
    chosen = sorted(rng.randrange(len(stages)) for _ in range(kills))
    # each of them, even for few kills
    victims = [v for _ in range(0, kills, len(VICTIMS)) for v in rng.sample(VICTIMS, len(VICTIMS))][:kills]
    how = [rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]) if v == "group" else signal.SIGKILL for v in victims]
    return [(stages[i], rng.uniform(0, spent[stages[i]]), v, s) for i, v, s in zip(chosen, victims, how)]


def killed_round(w:Workspace, rng, kills:int, spent:dict, expected:dict, done:list, removed:list):
    "Run the pipeline through some kills, added to `done`; fails if anything differs from an undisturbed run."
    wipe(w.root)
    for stage, delay, victim, signum in draw_kills(rng, kills, spent):
        kill = repro(partial(Repro.kill, stage=stage, delay=delay, victim=victim, signum=signum), removed, w)
        if kill is None: break # it ended before the kill
        done.append(kill)
        print(f"{len(done):3d} {kill.victim:6s} {kill.signal:7s} {kill.stage:22s} gone after {kill.seconds:.1f} s", flush=True)
        assert not corrupt(w.root), kill
    repro(Repro.finish, removed, w)
    found = results(w.root)
    assert {k: (found.get(k), v) for k, v in expected.items() if found.get(k) != v} == {} and found.keys() == expected.keys(), (
        "the result differs"
    )
    assert not corrupt(w.root)
    assert w.repro() == set(), "a second run runs no stage"
    assert "up to date" in w.run("dvc", "status", *STAGES)
    for split in ("train", "dev", "test"): w.run("ai2text", "verify", f"data/shards/{split}", "--index", f"data/index/{split}.json")


def table(kills:list)->str:
    "Kills by stage, process and signal, and the longest time until all processes had ended."
    count = Counter((k.stage, f"{k.victim} {k.signal[3:]}") for k in kills)
    columns = sorted({v for _, v in count})
    lines = [f"{'':24s}" + "".join(f"{c:>13s}" for c in columns) + f"{'all':>6s}"]
    for stage in ("start", *STAGES):
        row = [count[stage, c] for c in columns]
        if sum(row): lines.append(f"{stage:24s}" + "".join(f"{n or '':>13}" for n in row) + f"{sum(row):>6d}")
    lines.append(f"{'all':24s}" + "".join(f"{sum(n for (_, v), n in count.items() if v == c):>13d}" for c in columns) + f"{len(kills):>6d}")
    slowest = max(kills, key=lambda k: k.seconds)
    return "\n".join(
        [*lines, f"the last process was gone after {slowest.seconds:.1f} s at most ({slowest.victim} {slowest.signal} in {slowest.stage})"]
    )


def test_pipeline_killed_at_random_times_gives_the_same_result(tmp_path):
    w, rng, done, removed = Workspace(tmp_path/"w"), random.Random(0), [], []
    spent = Repro(w).finish()
    expected = results(w.root)
    while len(done) < KILLS: killed_round(w, rng, KILLS - len(done), spent, expected, done, removed)
    print(table(done))
    print(f"truncated by a kill: {removed or 'none'}; processor seconds: { {k: round(v, 1) for k, v in spent.items()} }")

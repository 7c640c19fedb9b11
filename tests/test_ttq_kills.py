"""A simulated run that is killed with kill -9 at random times: no written entry is lost, no milestone is lost or doubled, and
its hours are right, also when the wall clock jumps.

An attempt is a process that writes a log at high speed. It reports each entry on a pipe after the write has returned; the kill comes
some milliseconds after a random report, so that a slow machine gets as far as a fast one. The next attempt resumes from
the last reported checkpoint, so that work is lost and repeated. Time is simulated, so that an attempt has minutes; the true time
is in a memory-mapped page that outlives the process."""
import json, random, signal, struct, subprocess, sys, tempfile, time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from ai2text.ttq.log import load_log, read_entries
from conftest import too

ROOT = Path(__file__).resolve().parent.parent
# the last is never reached
PLAN = [dict(wer=wer, budget_hours=hours) for wer,hours in ((.8, .1), (.6, 2), (.45, 3), (.35, 500), (.3, 500), (.1, 500))]
JUMP = 9. # largest error of a jumping wall clock, hours
UNLOGGED_SECONDS = 6.5 # largest mean time between the last entry of an attempt and its end: 5 of a heartbeat and 1.5 of a step

ATTEMPT = """
import json, math, mmap, random, struct, sys, time
from ai2text.ttq.log import TTQTracker

log, page, attempt, step, wall, jump, seed = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
rng, step = random.Random(seed), int(step)
with open(page, "r+b") as f: truth = mmap.mmap(f.fileno(), 8)

class Clock:
    "Monotonic time is right with a random origin; the wall clock has a random error at each reading."
    origin, age = rng.uniform(0, 1e6), 0.
    def monotonic(self): return self.origin + self.age
    def time(self): return wall + self.age + rng.uniform(-jump, jump)*3600
    def work(self, seconds): # 50,000 times real time
        time.sleep(seconds/50_000)
        self.age += seconds
        struct.pack_into("d", truth, 0, self.age)

def report(*words): print(json.dumps(words), flush=True)

clock = Clock()
report("started", step)
run = TTQTracker(json.loads(sys.stdin.readline()), log, clock=clock, about=dict(attempt=int(attempt)), announce=lambda words: report("announced", words))
run.resumed(step, schedule=dict(max_steps=5_000, decay=.2))
report("resume", step)
while True:
    step += 1
    clock.work(rng.uniform(.5, 1.5))
    if run.due:
        run.beat(step=step)
        report("beat", step)
    if step % 50 == 0:
        clock.work(rng.uniform(5, 20))
        wer = .25 + .75*math.exp(-step/700)
        run.log_epoch(1, 1., round(wer*math.exp(rng.gauss(0, .03)), 4), step=step)
        report("evaluation", step)
    if step % 70 == 0:
        clock.work(rng.uniform(0, 2))
        run.saved(step)
        report("checkpoint", step, clock.age)
"""


@dataclass(frozen=True)
class Attempt:
    "An attempt as seen from outside."
    reported: list  # (kind, step) of each entry whose write returned
    announced: list # its messages of milestones
    saved: tuple    # step of its last checkpoint, and its age at that time; None
    seconds: float  # its duration
    down: float     # seconds from its end to the next start


def run_attempt(log, attempt:int, step:int, wall:float, jump:float, rng, most:int)->Attempt:
    "One attempt, killed at a random time, after at most `most` reports."
    with tempfile.NamedTemporaryFile() as page:
        page.write(struct.pack("d", 0.))
        page.flush()
        process = subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, *map(str, (log, page.name, attempt, step, wall, jump, rng.random()))],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.stdin.write(json.dumps(PLAN) + "\n")
        process.stdin.flush()
        lines = [process.stdout.readline() for _ in range(1 + rng.randrange(most))][1:] # the first is the start
        time.sleep(rng.uniform(0, .01))
        process.send_signal(signal.SIGKILL)
        words = [json.loads(line) for line in lines + process.stdout.readlines() if line.endswith("\n")]
        seconds, = struct.unpack("d", Path(page.name).read_bytes())
        process.stdin.close()
    assert process.wait() == -signal.SIGKILL
    saved = [w[1:] for w in words if w[0] == "checkpoint"]
    reported, announced = [tuple(w[:2]) for w in words if w[0] != "announced"], [w[1] for w in words if w[0] == "announced"]
    return Attempt(reported, announced, saved[-1] if saved else None, seconds, rng.expovariate(1/600))


def killed_run(log, kills:int, jump:float, seed=0, most=40)->list[Attempt]:
    "A run that is killed `kills` times."
    rng, attempts, step, wall = random.Random(seed), [], 0, 1.7e9
    for number in range(kills):
        attempts.append(run_attempt(log, number, step, wall, jump, rng, most))
        if attempts[-1].saved: step = attempts[-1].saved[0]
        wall += attempts[-1].seconds + attempts[-1].down
        if log.exists(): json.loads(log.read_text()) # the view is always valid JSON
    return attempts


def judge_entries(entries, attempts)->dict:
    "Reported entries that the log lacks, by attempt and in order, and entries that were written but not reported."
    logged = {number: [] for number in range(len(attempts))}
    for e in entries:
        if e["kind"] == "start": number = e["about"]["attempt"]
        elif e["kind"] in ("resume", "beat", "evaluation", "checkpoint"): logged[number].append((e["kind"], e["step"]))
    pairs = [
        pair for number, attempt in enumerate(attempts) for pair in zip_longest(attempt.reported, logged[number][: len(attempt.reported)])
    ]
    return dict(told=sum(len(attempt.reported) for attempt in attempts), lost=sum(mine != entry for mine,entry in pairs),
                untold=sum(len(logged[number]) - len(attempt.reported) for number,attempt in enumerate(attempts)))


def judge_milestones(entries, log, attempts)->dict:
    "The first crossing of each milestone, once in the log and once in the messages."
    evaluations = [e for e in entries if e["kind"] == "evaluation"]
    first = {m["wer"]: (e["val_wer"], e["step"]) for m in PLAN for e in reversed(evaluations) if e["val_wer"] <= m["wer"]}
    achieved = Counter(a["target_wer"] for a in log["achieved"])
    announced = Counter(words.split()[3] for attempt in attempts for words in attempt.announced if "achieved" in words)
    return dict(
        evaluations=len(evaluations), repeated=sum(bool(h.get("repeated")) for h in log["history"]), crossed=len(first),
        missing=len(first.keys() - achieved.keys()),
        doubled=sum(n > 1 for n in (*achieved.values(), *announced.values())),
        wrong=sum((a["achieved_wer"], a["step"]) != first[a["target_wer"]] for a in log["achieved"])
    )


def judge_time(entries, log, attempts, true_clock:bool)->dict:
    "Errors of the hours of attempts, of down time and of lost work, as shares of all hours."
    starts = [i for i,e in enumerate(entries) if e["kind"] == "start"]
    # lost time is computed at a resume
    resumed = max(entries[i]["about"]["attempt"] for i in starts if entries[i+1:i+2] and entries[i+1]["kind"] == "resume")
    lost = sum(attempt.seconds - (attempt.saved[1] if attempt.saved else 0) for attempt in attempts[:resumed])
    hours, down, totals = (
        sum(attempt.seconds for attempt in attempts) / 3600,
        sum(attempt.down for attempt in attempts[:-1]) / 3600,
        log["totals"],
    )
    return dict(
        hours=hours, hours_error=totals["elapsed_hours"] / hours - 1, lost_hours=lost / 3600,
        lost_error=(totals["lost_hours"] - lost / 3600) / hours,
        down_error=totals["down_hours"] / down - 1 if true_clock else None
    )


def judge_kills(path, attempts, true_clock:bool)->dict:
    "The log of a killed run against its attempts."
    entries, log = read_entries(path.with_suffix(".jsonl"))[0], load_log(path.with_suffix(".jsonl"))
    return (
        dict(kills=len(attempts))
        | judge_entries(entries, attempts)
        | judge_milestones(entries, log, attempts)
        | judge_time(entries, log, attempts, true_clock)
    )


@pytest.mark.parametrize("kills, jump", [(15, 0.), *too((25, 0.), (25, JUMP))])
def test_a_run_killed_many_times_loses_nothing(tmp_path, kills, jump):
    log = tmp_path/"run/ttq_log.json"
    attempts = killed_run(log, kills, jump, seed=int(jump))
    found = judge_kills(log, attempts, true_clock=not jump)
    print(found)
    assert found["lost"] == 0 and found["untold"] <= len(attempts), "each reported entry is in the log, and at most one more an attempt"
    assert found["crossed"] >= 2 and found["missing"] == found["doubled"] == found["wrong"] == 0, "milestones"
    unlogged = len(attempts)*UNLOGGED_SECONDS/3600/found["hours"]
    assert all(-unlogged < found[error] < 0.001 for error in ("hours_error", "lost_error")), (
        "all hours up to the last entry of each attempt, and no more"
    )
    assert jump or abs(found["down_error"]) < .01, "the time between attempts, where the wall clock is true"
    assert found["repeated"], "lost work was repeated"

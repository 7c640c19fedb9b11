"""A simulated run that is killed with kill -9, again and again, at random moments: nothing that was written is lost, no
milestone is lost or doubled, and its hours are true, however its clocks jump.

A attempt is a process that keeps a tracker's books at high speed. It says on a pipe what has been written, after the call
has returned; the kill comes some milliseconds after a word that is drawn, so that a slow machine gets as far as a fast one.
The next attempt goes on from the last checkpoint that was told, so that work is lost and repeated. Time is simulated, so that a attempt lasts minutes and not
moments: it passes while the process works, and stands in a page of memory that outlives the process. That is the truth."""
import json, random, signal, struct, subprocess, sys, tempfile, time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from ai2text.ttq.log import load_log, read_entries
from conftest import too

ROOT = Path(__file__).resolve().parent.parent
PLAN = [dict(wer=wer, budget_hours=hours) for wer,hours in ((.8, .1), (.6, 2), (.45, 3), (.35, 500), (.3, 500), (.1, 500))] # the last is never reached
JUMP = 9. # hours that a jumping clock is off at most
UNTOLD_SECONDS = 6.5 # between the last entry of a attempt and its end, in the mean at most: a heartbeat's 5 and a step's 1.5

LIFE = """
import json, math, mmap, random, struct, sys, time
from ai2text.ttq.log import TTQTracker

log, page, attempt, step, wall, jump, seed = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
rng, step = random.Random(seed), int(step)
with open(page, "r+b") as f: truth = mmap.mmap(f.fileno(), 8)

class Clock:
    "Durations are true and begin anywhere; the wall clock is off by hours, by others each time it is looked at."
    origin, lived = rng.uniform(0, 1e6), 0.
    def monotonic(self): return self.origin + self.lived
    def time(self): return wall + self.lived + rng.uniform(-jump, jump)*3600
    def work(self, seconds): # 50,000 times as fast as attempt
        time.sleep(seconds/50_000)
        self.lived += seconds
        struct.pack_into("d", truth, 0, self.lived)

def tell(*words): print(json.dumps(words), flush=True)

clock = Clock()
tell("born", step)
run = TTQTracker(json.loads(sys.stdin.readline()), log, clock=clock, about=dict(attempt=int(attempt)), announce=lambda words: tell("announced", words))
run.resumed(step, schedule=dict(max_steps=5_000, decay=.2))
tell("resume", step)
while True:
    step += 1
    clock.work(rng.uniform(.5, 1.5))
    if run.due:
        run.beat(step=step)
        tell("beat", step)
    if step % 50 == 0:
        clock.work(rng.uniform(5, 20))
        wer = .25 + .75*math.exp(-step/700)
        run.log_epoch(1, 1., round(wer*math.exp(rng.gauss(0, .03)), 4), step=step)
        tell("evaluation", step)
    if step % 70 == 0:
        clock.work(rng.uniform(0, 2))
        run.saved(step)
        tell("checkpoint", step, clock.lived)
"""


@dataclass(frozen=True)
class Life:
    "What is known of a attempt from outside."
    told: list      # (kind, step) of each entry whose write returned
    announced: list # what it said of milestones
    saved: tuple    # step of its last checkpoint, and how long it had lived by then; None
    seconds: float  # how long it lived
    down: float     # seconds from its end to the next birth


def live(log, attempt:int, step:int, wall:float, jump:float, rng, most:int)->Life:
    "One attempt, killed at a random moment, after `most` words at the latest."
    with tempfile.NamedTemporaryFile() as page:
        page.write(struct.pack("d", 0.))
        page.flush()
        process = subprocess.Popen([sys.executable, "-c", LIFE, *map(str, (log, page.name, attempt, step, wall, jump, rng.random()))], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps(PLAN) + "\n")
        process.stdin.flush()
        heard = [process.stdout.readline() for _ in range(1 + rng.randrange(most))][1:] # the first one says that it is born
        time.sleep(rng.uniform(0, .01))
        process.send_signal(signal.SIGKILL)
        words = [json.loads(line) for line in heard + process.stdout.readlines() if line.endswith("\n")]
        seconds, = struct.unpack("d", Path(page.name).read_bytes())
        process.stdin.close()
    assert process.wait() == -signal.SIGKILL
    saved = [w[1:] for w in words if w[0] == "checkpoint"]
    return Life([tuple(w[:2]) for w in words if w[0] != "announced"], [w[1] for w in words if w[0] == "announced"], saved[-1] if saved else None, seconds, rng.expovariate(1/600))


def killed_run(log, kills:int, jump:float, seed=0, most=40)->list[Life]:
    "A run that is killed again and again."
    rng, attempts, step, wall = random.Random(seed), [], 0, 1.7e9
    for number in range(kills):
        attempts.append(live(log, number, step, wall, jump, rng, most))
        if attempts[-1].saved: step = attempts[-1].saved[0]
        wall += attempts[-1].seconds + attempts[-1].down
        if log.exists(): json.loads(log.read_text()) # the view is whole at every moment
    return attempts


def judge_entries(entries, attempts)->dict:
    "What was told is in the log, each attempt's in its order; what else is there was written and not yet told."
    kept = {number: [] for number in range(len(attempts))}
    for e in entries:
        if e["kind"] == "start": number = e["about"]["attempt"]
        elif e["kind"] in ("resume", "beat", "evaluation", "checkpoint"): kept[number].append((e["kind"], e["step"]))
    return dict(told=sum(len(attempt.told) for attempt in attempts), lost=sum(mine != there for number,attempt in enumerate(attempts) for mine,there in zip_longest(attempt.told, kept[number][:len(attempt.told)])),
                untold=sum(len(kept[number]) - len(attempt.told) for number,attempt in enumerate(attempts)))


def judge_milestones(entries, books, attempts)->dict:
    "The first crossing of each, once, in the log and in what was said."
    evaluations = [e for e in entries if e["kind"] == "evaluation"]
    first = {m["wer"]: (e["val_wer"], e["step"]) for m in PLAN for e in reversed(evaluations) if e["val_wer"] <= m["wer"]}
    achieved = Counter(a["target_wer"] for a in books["achieved"])
    said = Counter(words.split()[3] for attempt in attempts for words in attempt.announced if "achieved" in words)
    return dict(evaluations=len(evaluations), repeated=sum(bool(h.get("repeated")) for h in books["history"]), crossed=len(first), missing=len(first.keys() - achieved.keys()),
                doubled=sum(n > 1 for n in (*achieved.values(), *said.values())), wrong=sum((a["achieved_wer"], a["step"]) != first[a["target_wer"]] for a in books["achieved"]))


def judge_time(entries, books, attempts, true_clock:bool)->dict:
    "Hours against the truth, as shares of all hours: of the attempts, between them, and those whose work was lost with a kill."
    starts = [i for i,e in enumerate(entries) if e["kind"] == "start"]
    resumed = max(entries[i]["about"]["attempt"] for i in starts if entries[i+1:i+2] and entries[i+1]["kind"] == "resume") # lost time is told with it
    lost = sum(attempt.seconds - (attempt.saved[1] if attempt.saved else 0) for attempt in attempts[:resumed])
    hours, down, log = sum(attempt.seconds for attempt in attempts)/3600, sum(attempt.down for attempt in attempts[:-1])/3600, books["totals"]
    return dict(hours=hours, hours_error=log["elapsed_hours"]/hours - 1, lost_hours=lost/3600, lost_error=(log["lost_hours"] - lost/3600)/hours,
                down_error=log["down_hours"]/down - 1 if true_clock else None)


def judge_kills(log, attempts, true_clock:bool)->dict:
    "A killed run's log against what was seen from outside."
    entries, books = read_entries(log.with_suffix(".jsonl"))[0], load_log(log.with_suffix(".jsonl"))
    return dict(kills=len(attempts)) | judge_entries(entries, attempts) | judge_milestones(entries, books, attempts) | judge_time(entries, books, attempts, true_clock)


@pytest.mark.parametrize("kills, jump", [(15, 0.), *too((25, 0.), (25, JUMP))])
def test_a_run_killed_again_and_again(tmp_path, kills, jump):
    log = tmp_path/"run/ttq_log.json"
    attempts = killed_run(log, kills, jump, seed=int(jump))
    found = judge_kills(log, attempts, true_clock=not jump)
    print(found)
    assert found["lost"] == 0 and found["untold"] <= len(attempts), "an entry whose write returned is in the log, and at most one more a attempt"
    assert found["crossed"] >= 2 and found["missing"] == found["doubled"] == found["wrong"] == 0, "milestones"
    untold = len(attempts)*UNTOLD_SECONDS/3600/found["hours"]
    assert all(-untold < found[error] < .001 for error in ("hours_error", "lost_error")), "no more hours than were lived, and none less but what came after the last entry of a attempt"
    assert jump or abs(found["down_error"]) < .01, "the time between attempts, where the wall clock is true"
    assert found["repeated"], "work was lost and done again"

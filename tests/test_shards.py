"Shards have the same bytes after kills at random moments, from a cluster, and from a cluster that loses a worker."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile as sf

from ai2text.core.files import sha256
from ai2text.core.params import ConfigError
from ai2text.data.shards import create_shards, verify
from conftest import ROOT, free_port

OPTIONS = dict(shard_size=10, codec="flac")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A folder of 200 recordings, some at another rate and some unreadable, and their transcripts."
    folder, draw = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for i in range(200):
        rate = 44_100 if i%20 == 0 else 16_000
        sf.write(folder/f"{i}.wav", np.int16(draw.standard_normal(rate//2 + i).cumsum().clip(-99, 99)*300), rate)
    for i in (7, 77): (folder/f"{i}.wav").write_bytes(b"no audio")
    transcripts = folder.parent/f"{folder.name}.json"
    transcripts.write_text(json.dumps({str(i): f"câu số {i}" for i in range(200)}))
    return folder, transcripts


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    "The expected digests of every run."
    out = tmp_path_factory.mktemp("whole")
    assert len(create_shards(*corpus, out, processes=1, **OPTIONS)) == 198
    assert verify(out) == []
    return digests(out)


def digests(folder): return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


# Interruption

def kill_and_resume(command, out_dir, kills, seed=0):
    "Kill a shard writer with its processes at random moments. Only complete shards may remain, and the next run must give the same bytes."
    draw, outcomes = random.Random(seed), []

    def run(seconds=None):
        "Seconds of writing, or None if killed after `seconds`."
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not out_dir.exists(): time.sleep(0.002)
            started = time.monotonic()
            try: assert process.wait(seconds) == 0
            except subprocess.TimeoutExpired: return os.killpg(process.pid, signal.SIGKILL)
            return time.monotonic() - started

    writing, whole = run(), digests(out_dir)
    for i in range(kills):
        shutil.rmtree(out_dir)
        moment = (i + draw.random())/kills
        ended = run(moment*writing) is not None
        left = {name: digest for name, digest in digests(out_dir).items() if name.startswith("shard-")}
        assert left.items() <= whole.items(), f"a run killed after {moment:.0%} of its writing left an incomplete shard"
        run()
        assert digests(out_dir) == whole, f"resumed after a kill at {moment:.0%} of its writing, the run gave other bytes"
        outcomes.append(dict(moment=moment, shards=len(left), ended=ended))
    return outcomes


def command(corpus, out):
    options = dict(audio_dir=corpus[0], transcript_file=corpus[1], output_dir=out, processes=2, **OPTIONS)
    return [sys.executable, "-m", "ai2text.pipeline.cli", "shards",
            *(str(o) for k, v in options.items() for o in ("--" + k.replace("_", "-"), v))]


def test_a_killed_writer_resumes_to_the_same_bytes(corpus, whole, tmp_path):
    outcomes = kill_and_resume(command(corpus, tmp_path/"out"), tmp_path/"out", kills=5)
    assert not all(o["ended"] for o in outcomes), f"no run was killed in time: {outcomes}"
    assert digests(tmp_path/"out") == whole


# A cluster

@pytest.fixture
def scheduler(tmp_path):
    "A local Dask scheduler with two worker processes: its address, and the workers."
    pytest.importorskip("distributed")
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    quiet = dict(env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                 start_new_session=True)
    started = [subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
                                 "--no-dashboard"], **quiet)]
    started += [subprocess.Popen([sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--nthreads", "1",
                                  "--no-dashboard", "--no-nanny",
                                  "--local-directory", tmp_path/f"worker {i}"], **quiet) for i in range(2)]
    try:
        from distributed import Client
        with Client(address, timeout=200, set_as_default=False) as client: client.wait_for_workers(2, timeout=200)
        yield address, started[1:]
    finally:
        for process in started[::-1]:
            if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes_also_when_a_worker_is_killed(corpus, whole, scheduler, tmp_path):
    address, workers = scheduler
    create_shards(*corpus, tmp_path/"out", scheduler=address, **OPTIONS)
    assert digests(tmp_path/"out") == whole
    # again, with one worker killed after the first shards
    done = []
    run = threading.Thread(target=lambda: done.append(create_shards(*corpus, tmp_path/"again", scheduler=address, **OPTIONS)))
    run.start()
    while run.is_alive() and len(list((tmp_path/"again").glob("shard-*.tar"))) < 2: time.sleep(0.005)
    os.killpg(workers[0].pid, signal.SIGKILL)
    assert len(list((tmp_path/"again").glob("shard-*.tar"))) < 20, "the run finished before the worker was killed"
    run.join(60)
    assert done and digests(tmp_path/"again") == whole


@pytest.mark.slow
def test_an_unreachable_scheduler_is_an_error(corpus, tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match="scheduler nowhere: does not answer"):
        create_shards(*corpus, tmp_path/"out", scheduler="nowhere", **OPTIONS)

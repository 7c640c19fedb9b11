"Each utterance exactly once, with any number of ranks, workers and shards, and after kills."
import gc
import json
import math
import multiprocessing
import os
import random
import signal
import time
import zlib

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.distributed as dist

from ai2text.core.files import write_json
from ai2text.data.loader import create_webdataset_loader
from ai2text.core.sections import ShardsConfig
from ai2text.data.shards import write_shards
from conftest import too

fork = multiprocessing.get_context("fork")
SHARDS = 1, 7
COUNT = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The same utterances in one shard and in seven."
    home = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    rows = [dict(id=f"u{i}", audio_filepath=f"{i}.wav", text=f"câu {i}", speaker="s") for i in range(COUNT)]
    for i in range(COUNT): sf.write(home/f"{i}.wav", rng.integers(-9000, 9000, 800 + 160*(i*37 % 60)).astype(np.int16), 16_000)
    for shards in SHARDS:
        index = write_shards(rows, home/f"{shards}", home/f"{shards}/index.json", ShardsConfig(shard_size=-(-COUNT//shards), processes=1),
                             audio_root=home)
        assert len(index.shards) == shards
    return home


def make(folder, **settings):
    return create_webdataset_loader(folder, **{**dict(batch_size=8, batch_seconds=3, shuffle_buffer=30, seed=5), **settings})


# Ranks, workers, shards

def rank_of(rank, world, home, results):
    "One rank: two epochs of every case. All ranks synchronize after each step, so an extra or missing step would hang."
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/store {world}", rank=rank, world_size=world)
    for shards in SHARDS:
        for workers in (0, 1, 3):
            loader = make(home/f"{shards}", num_workers=workers, rank=rank, world=world)
            epochs = []
            for _ in range(2):
                ids, steps = [], 0
                for batch in loader:
                    units = torch.tensor([float(len(batch)), 1.])
                    dist.all_reduce(units)
                    assert units[1] == world, "the ranks are at different steps"
                    ids, steps = ids + batch.ids, steps + 1
                epochs.append((steps, ids))
            gathered = [None]*world
            dist.all_gather_object(gathered, epochs)
            if rank == 0: results.put((shards, workers, gathered))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, *too(1, 3)])
def test_each_utterance_is_read_once_for_any_ranks_workers_and_shards(home, world):
    results = fork.Queue()
    ranks = [fork.Process(target=rank_of, args=(r, world, home, results)) for r in range(world)]
    for process in ranks: process.start()
    found = [results.get(timeout=100) for _ in range(6)]
    for process in ranks: process.join(20)
    assert [process.exitcode for process in ranks] == [0]*world
    for shards, workers, gathered in found:
        for epoch in range(2):
            assert len({epochs[epoch][0] for epochs in gathered}) == 1, "unequal steps"
            ids = [i for epochs in gathered for i in epochs[epoch][1]]
            assert sorted(ids) == sorted(f"u{i}" for i in range(COUNT)), (shards, workers, epoch)
        assert gathered[0][0][1] != gathered[0][1][1], "epochs differ"
    for shards in SHARDS: # equal for all numbers of workers
        assert len({json.dumps(gathered) for s, _, gathered in found if s == shards}) == 1


def test_order_does_not_depend_on_ranks(home):
    "Two ranks alternate between the micro-batches of one."
    one = [b.ids for b in make(home/"7", num_workers=0)]
    parts = [[b.ids for b in make(home/"7", num_workers=0, rank=r, world=2)] for r in range(2)]
    whole = len(one)//2*2
    assert [ids for pair in zip(*parts) for ids in pair][:whole] == one[:whole]


# Interruption

def consume(folder, workers, path, total, most=math.inf):
    "Take batches up to `total` and record each with the loader's state in one file. With `most`, block after that many."
    done = json.loads(path.read_text()) if path.exists() else dict(state=None, batches=[])
    loader = make(folder, num_workers=workers)
    if done["state"]: loader.load_state_dict(done["state"])
    while len(done["batches"]) < total:
        for batch in loader:
            done["batches"].append([batch.epoch, batch.number, batch.ids, zlib.crc32(batch.audio.numpy().tobytes())])
            done["state"] = loader.state_dict()
            write_json(path, done)
            if len(done["batches"]) == total: break
            while len(done["batches"]) >= most: time.sleep(1)


@pytest.mark.parametrize("workers", [2, *too(0)])
def test_batches_are_unchanged_after_twenty_kills(home, tmp_path, workers):
    "Twenty SIGKILLs at random steps within three epochs."
    total, rng = 3*len(make(home/"7", num_workers=0)) - 2, random.Random(workers)
    consume(home/"7", 0, tmp_path/"whole.json", total)
    path, kills = tmp_path/"killed.json", 0
    steps = sorted(rng.sample(range(1, total), 20))
    for step in steps:
        child = fork.Process(target=consume, args=(home/"7", workers, path, total, step + 3))
        child.start()
        while not path.exists() or len(json.loads(path.read_text())["batches"]) < step:
            assert child.is_alive() or child.exitcode == 0
            time.sleep(0.0005)
        if child.is_alive(): os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    consume(home/"7", workers, path, total)
    assert json.loads(path.read_text()) == json.loads((tmp_path/"whole.json").read_text())
    assert kills > 15 # the last ones may finish first


# Resources

@pytest.mark.slow
def test_memory_is_flat_and_files_are_closed(home):
    "Twenty epochs: memory and open files do not grow after the fifth."
    def usage():
        gc.collect()
        with open("/proc/self/statm") as f: return int(f.read().split()[1])*os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
    loader, after = make(home/"7", num_workers=2), []
    for _ in range(20):
        for _ in loader: pass
        after.append(usage())
    assert after[-1][0] - after[4][0] < 5e6, after
    assert after[-1][1] == after[4][1], after


def test_reading_ahead_is_bounded_in_bytes(home):
    "`prefetch_mb` for one batch: one is read ahead, with any number of workers."
    loader = make(home/"7", num_workers=3)
    largest = max(len(u)*int(loader.samples[u].max())*4 for u in loader.plan(0))
    for megabytes, expected in ((largest/1e6, 1), (2.5*largest/1e6, 2), (256, 6)):
        loader = make(home/"7", num_workers=3, prefetch_mb=megabytes)
        loader.batch, reads = counted(loader.batch)
        for handed, _ in enumerate(loader):
            time.sleep(0.002)
            assert len(reads) - handed <= expected, (len(reads), handed)
        assert handed + 1 == len(reads)


def counted(function):
    "A function that records its first arguments, and the list of these."
    calls = []
    def recording(*arguments):
        calls.append(arguments[0])
        return function(*arguments)
    return recording, calls

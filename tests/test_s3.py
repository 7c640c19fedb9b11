"Shards from a real S3 server: credentials, DVC at any revision, connections that break."
import hashlib
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import webdataset as wds

from ai2text.testing.s3_faults import KEY, SECRET, Faults, bad_line
from ai2text.data.loader import create_webdataset_loader
from ai2text.data.storage import Cache, S3Stream, Server, _client, register_gopen
from ai2text.data.shard_index import ShardError, load_index
from ai2text.core.sections import ShardsConfig
from ai2text.data.shards import write_shards


def make_shards(folder, count=60, shard_size=10, tone=5):
    "Write shards of short tones with index.json; returns the samples of each id."
    sounds = folder.with_name(f"{folder.name} sounds")
    sounds.mkdir(parents=True)
    waves = {f"u{i}": (np.sin(np.arange(1600 + 160*(i*37 % 60))/(tone + i))*8000).astype(np.int16) for i in range(count)}
    for name, wave in waves.items(): sf.write(sounds/f"{name}.wav", wave, 16_000)
    rows = [dict(id=name, audio_filepath=f"{name}.wav", text=f"câu {name}", speaker="s") for name in waves]
    write_shards(rows, folder, folder/"index.json", ShardsConfig(shard_size=shard_size, processes=1), audio_root=sounds)
    return waves


def epoch(loader, waves):
    "The ids of one epoch; the samples of each are compared."
    ids = []
    for batch in loader:
        for wave, length, name in zip(batch.audio, batch.lengths, batch.ids):
            assert ((wave[:length]*32768).short().numpy() == waves[name]).all(), name
            ids.append(name)
    return ids


# Credentials

@pytest.fixture
def no_aws(monkeypatch):
    "Without the AWS settings of this machine."
    for name in [n for n in os.environ if n.startswith("AWS_")]: monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"): monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _client.cache_clear()
    yield monkeypatch
    _client.cache_clear()


def read(url="s3://bucket/a", server=Server()):
    with S3Stream(url, server) as stream: return stream.read()


def test_credentials_come_from_the_standard_variables(store, no_aws):
    (store.folder/"bucket/a").write_bytes(b"here")
    no_aws.setenv("AWS_ENDPOINT_URL", store.url)
    with pytest.raises(ShardError, match="s3://bucket/a: no credentials; set AWS_ACCESS_KEY_ID"): read()
    for name, value in (("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)): no_aws.setenv(name, value)
    _client.cache_clear()
    assert read() == b"here"


def test_credentials_come_from_a_profile(store, no_aws, tmp_path):
    (store.folder/"bucket/a").write_bytes(b"here")
    (tmp_path/"config").write_text(f"[profile dev]\nendpoint_url = {store.url}\nregion = us-west-2\n")
    (tmp_path/"credentials").write_text(f"[dev]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    no_aws.setenv("AWS_CONFIG_FILE", str(tmp_path/"config"))
    no_aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path/"credentials"))
    assert read(server=Server(profile="dev")) == b"here"


def test_wrong_credentials_fail_at_once(store):
    (store.folder/"bucket/a").write_bytes(b"here")
    for wrong in (dict(key="nobody"), dict(secret="wrong")):
        with pytest.raises(ShardError, match="s3://bucket/a: An error occurred"): read(server=store.server._replace(**wrong))


# Complete shards

def test_an_epoch_is_complete_over_cuts_and_stalls(store, tmp_path):
    "100 broken connections and 5 stalls, over several epochs: no sample is missing, repeated or wrong."
    waves = make_shards(tmp_path/"shards")
    shutil.copytree(tmp_path/"shards", store.folder/"bucket/shards")
    cuts = stalls = epochs = 0
    while cuts < 100 or stalls < 5:
        with bad_line(store.url, Faults(every=15_000, stalls=0.06, seed=epochs)) as line:
            loader = create_webdataset_loader("s3://bucket/shards", 8, 2, batch_seconds=4, seed=epochs,
                                              cache=Cache(tmp_path/f"cache {epochs}"),
                                              server=store.server._replace(endpoint=line.url, timeout=0.2, tries=20))
            assert sorted(epoch(loader, waves)) == sorted(waves)
            assert loader.report()["skipped"] == []
            cuts, stalls, epochs = cuts + line.cuts.value, stalls + line.stalls.value, epochs + 1
    assert epochs > 1


def test_webdataset_reads_complete_shards_over_a_bad_connection(store, tmp_path):
    waves = make_shards(tmp_path/"shards")
    shutil.copytree(tmp_path/"shards", store.folder/"bucket/shards")
    names = sorted(p.name for p in (tmp_path/"shards").glob("*.tar"))
    with bad_line(store.url, Faults(every=20_000)) as line:
        register_gopen(store.server._replace(endpoint=line.url, tries=20))
        samples = list(wds.WebDataset([f"s3://bucket/shards/{n}" for n in names], shardshuffle=False, handler=wds.reraise_exception))
        assert line.cuts.value > 3
    assert sorted(s["__key__"] for s in samples) == sorted(waves)


def test_readers_share_a_cache(store, tmp_path):
    "Four concurrent loaders of two ranks download every shard once."
    waves = make_shards(tmp_path/"shards")
    shutil.copytree(tmp_path/"shards", store.folder/"bucket/shards")
    index = load_index(tmp_path/"shards/index.json")
    with bad_line(store.url, Faults(delay=0.01)) as line:
        server = store.server._replace(endpoint=line.url)
        make = lambda rank: create_webdataset_loader("s3://bucket/shards", 8, 1, index=index, cache=Cache(tmp_path/"cache"), server=server,
                                                     rank=rank, world=2)
        with ThreadPoolExecutor(4) as pool: parts = list(pool.map(lambda rank: epoch(make(rank), waves), [0, 1, 0, 1]))
        assert line.requests.value == len(index.shards) == 6
    for first in (0, 2): assert sorted(parts[first] + parts[first + 1]) == sorted(waves)


def test_an_object_that_differs_from_the_index_is_an_error(store, tmp_path):
    make_shards(tmp_path/"shards")
    make_shards(tmp_path/"other", tone=9)
    shutil.copytree(tmp_path/"other", store.folder/"bucket/shards")
    loader = create_webdataset_loader("s3://bucket/shards", 8, 1, index=tmp_path/"shards/index.json", server=store.server,
                                      cache=Cache(tmp_path/"cache"))
    with pytest.raises(ShardError, match=r"s3://bucket/shards/shard-00000\d.tar: has SHA-256 .* of its index"): list(loader)
    assert not [p.name for p in (tmp_path/"cache").iterdir() if p.name != ".lock" and p.suffix != ".part"] # a download may be running
    with pytest.raises(ShardError, match="s3://bucket/nothing/index.json: .*NoSuchKey"):
        create_webdataset_loader("s3://bucket/nothing", 8, server=store.server)


# DVC

def test_any_revision_is_read_from_the_remote(store, tmp_path):
    "Two commits of one folder of shards; neither is in the workspace."
    from dvc.repo import Repo # 1 s to import
    home = tmp_path/"repo"
    home.mkdir()
    def git(*words): subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=home, capture_output=True,
                                    check=True)
    def commit(name):
        with Repo(str(home)) as repo: repo.add([str(home/"data/shards")])
        git("add", "."), git("commit", "-qm", name), git("tag", name)
        with Repo(str(home)) as repo: repo.push()
    git("init", "-q")
    with Repo.init(str(home)): pass
    (home/".dvc/config").write_text(f"[core]\n    remote = far\n['remote \"far\"']\n    url = s3://bucket/dvc\n    "
                                    f"endpointurl = {store.url}\n")
    (home/".dvc/config.local").write_text(f"['remote \"far\"']\n    access_key_id = {KEY}\n    secret_access_key = {SECRET}\n")
    first = make_shards(home/"data/shards", 30)
    commit("one")
    shutil.rmtree(home/"data/shards")
    second = make_shards(tmp_path/"again", 40, tone=9)
    shutil.copytree(tmp_path/"again", home/"data/shards")
    commit("two")

    def load(rev="", cache="cache", **kw):
        return create_webdataset_loader(home/"data/shards", 8, 2, rev=rev, cache=Cache(tmp_path/cache), **kw)
    assert sorted(epoch(load("one", "unused"), first)) == sorted(first) # from DVC's own cache
    assert not list((tmp_path/"unused").glob("[0-9a-f]*"))
    for folder in (home/"data/shards", home/".dvc/cache/files"): shutil.rmtree(folder)
    state = load().state_dict()
    assert sorted(epoch(load(), second)) == sorted(second)
    assert sorted(epoch(load("one"), first)) == sorted(first)
    assert len(list((tmp_path/"cache").glob("[0-9a-f]*"))) == 7
    assert sorted(epoch(load("HEAD", index=home/"data/shards/index.json"), second)) == sorted(second)
    with pytest.raises(ShardError, match="the state is of data"): load("one").load_state_dict(state)
    with pytest.raises(ShardError, match="not found here, and DVC cannot open it at three: unknown Git revision"): load("three")
    with pytest.raises(ShardError, match="nothing/index.json: not found here, and DVC does not track index.json"):
        create_webdataset_loader(home/"data/nothing", 8)


# The cache

def test_a_small_cache_stays_within_its_limit(store, tmp_path):
    "Eight threads read six objects at random, through a cache for two and a half."
    contents = {f"{i}": random.Random(i).randbytes(200_000) for i in range(6)}
    for name, data in contents.items(): (store.folder/"bucket"/name).write_bytes(data)
    cache = Cache(tmp_path/"cache", gb=0.0005)
    def work(seed):
        rng = random.Random(seed)
        for _ in range(25):
            name = rng.choice(list(contents))
            with open(cache.open(f"s3://bucket/{name}", hashlib.sha256(contents[name]).hexdigest(), 200_000, store.server), "rb") as f:
                assert f.read() == contents[name]
            held = 0
            for path in Path(cache.folder).iterdir():
                try: held += path.stat().st_size
                except FileNotFoundError: pass
            assert held <= 600_000 # the listing is not atomic: it may include an object removed since
    with ThreadPoolExecutor(8) as pool: list(pool.map(work, range(8)))
    assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= 500_000

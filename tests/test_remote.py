"Data shared through DVC and a real S3 server: who is refused, what breaks half-way, two at once, and what is gone comes back."
import contextlib
import hashlib
import importlib
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import botocore.session
import dvc.cli
import dvc.logger
import pytest

from ai2text.testing.s3_faults import KEY, SECRET, Faults, bad_line, serve_s3

for name in ("configobj", "dulwich.repo", "dvc.cachemgr", "dvc.cli.parser", "dvc.data_cloud", "dvc.lock", "dvc.repo", "dvc_data.index", "dvc_render.vega", "dvc_s3", "psutil", "s3fs", "scmrepo.git"):
    importlib.import_module(name) # once, here, and not in each process below
fork = multiprocessing.get_context("fork")
FILES, SIZE = 12, 100_000 # of a commit, and bytes of each
CONFIG = """[core]
    remote = far
    analytics = false
['remote "far"']
    url = s3://{bucket}/dvc
    endpointurl = {url}
    verify = {verify}
"""


def _dvc(arguments, folder, environment, out, limit):
    "What `dvc` does, in a fork of this process: it need not import DVC again."
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(out, "wb", 0) as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
    if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for name in ("dvc", "dvc_data", "dvc_objects"): logging.getLogger(name).handlers.clear()
    dvc.logger.setup()
    code = dvc.cli.main(list(arguments))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class Machine:
    "A user with a clone, a home and a cache of its own."
    def __init__(self, home:Path):
        self.home, self.root = home, home/"project"
        if self.root.exists(): return
        (self.root/".dvc").mkdir(parents=True)
        self.git("init", "-q", "-b", "main")
        (self.root/".dvc/config").touch()
        (self.root/".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")

    def use(self, url, bucket="bucket", verify=False):
        "Share by this server."
        (self.root/".dvc/config.local").write_text(CONFIG.format(url=url, bucket=bucket, verify=str(verify).lower()))
        return self

    def environment(self, **changes)->dict:
        "Nothing of this machine's own settings."
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "DVC_", "XDG_", "GIT_AUTHOR", "GIT_COMMITTER"))}
        git = {f"GIT_{who}_{what}": "someone@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        own = dict(HOME=str(self.home), DVC_SITE_CACHE_DIR=str(self.home/"site"), AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true")
        return {k: v for k, v in {**kept, **git, **own, **changes}.items() if v is not None}

    def git(self, *arguments, cwd=None):
        done = subprocess.run(["git", *arguments], cwd=cwd or self.root, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def start(self, *arguments, limit=0, **changes):
        "DVC in a process of its own."
        process = fork.Process(target=_dvc, args=(arguments, self.root, self.environment(**changes), self.home/"said", limit), daemon=True)
        process.start()
        return process

    def end(self, process)->int:
        "Wait until it ends; its exit code. What DVC said is in `said`."
        process.join()
        self.said = (self.home/"said").read_text()
        print(f"{self.home.name}: {process.exitcode}\n{self.said}")
        return process.exitcode

    def dvc(self, *arguments, ok=True, **how)->str:
        "Run DVC; all that it said."
        code = self.end(self.start(*arguments, **how))
        assert (code == 0) == ok, f"dvc {' '.join(arguments)} ended with {code}:\n{self.said}"
        return self.said

    def write(self, seed, count=FILES, size=SIZE):
        "Put files into data/."
        (self.root/"data").mkdir(exist_ok=True)
        for i in range(count): (self.root/f"data/{seed}-{i}").write_bytes(random.Random(f"{seed} {i}").randbytes(size))

    def commit(self, name):
        "Track data/ and tag the commit."
        self.dvc("add", "-q", "data")
        self.git("add", "-A"), self.git("commit", "-qm", name), self.git("tag", name)

    def data(self)->dict: return {p.name: p.read_bytes() for p in (self.root/"data").glob("*")}

    @property
    def cache(self): return self.root/".dvc/cache"


def names(folder:Path)->dict:
    "The objects of a cache or a remote by name. What a killed one was writing is none: it has its name when it is whole."
    return {p.parent.name + p.name: p for p in folder.rglob("??/*") if re.fullmatch(r"[0-9a-f]{32}(?!.*\.tmp$).*", p.parent.name + p.name)}


def objects(folder:Path)->set:
    "The names of the objects of a cache or a remote; each one is what its name says."
    found = names(folder)
    wrong = [name for name, p in found.items() if hashlib.md5(p.read_bytes()).hexdigest() != name.removesuffix(".dir")]
    assert not wrong, f"corrupt: {wrong}"
    return set(found)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A machine with one commit of data."
    machine = Machine(tmp_path_factory.mktemp("first"))
    machine.write("one")
    machine.commit("one")
    return machine


@pytest.fixture
def a(first, store, tmp_path):
    "A machine with one commit of data, which nobody else has."
    shutil.copytree(first.home, tmp_path/"a")
    return Machine(tmp_path/"a").use(store.url)


def clone(a, name="b"):
    "A machine with a fresh clone and an empty cache."
    home = a.home.with_name(name)
    subprocess.run(["git", "clone", "-q", a.root, home/"project"], check=True)
    shutil.copy(a.root/".dvc/config.local", home/"project/.dvc/config.local")
    return Machine(home)


def wait_for(count, folder, process):
    "Until a folder has so many objects, while the process lives."
    while process.is_alive() and len(names(folder)) < count: time.sleep(0.01)
    assert process.is_alive(), f"it ended before there were {count} objects"


# Refused

def test_wrong_key_and_no_bucket(a, store):
    """Nothing comes, nothing is made, and with the right settings all is well. Of a missing bucket a push says so. A pull does
    not: it takes the bucket for an empty one, and speaks of missing files as for data that were never pushed."""
    assert "Forbidden" in a.dvc("push", ok=False, AWS_ACCESS_KEY_ID="nobody")
    assert "Unable to locate credentials" in a.dvc("push", ok=False, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    assert "The specified bucket does not exist" in a.use(store.url, "missing").dvc("push", ok=False)
    assert [p.name for p in store.folder.rglob("*")] == ["bucket"]
    a.use(store.url).dvc("push")
    b = clone(a)
    assert "Forbidden" in b.dvc("pull", ok=False, AWS_SECRET_ACCESS_KEY="wrong")
    said = b.use(store.url, "missing").dvc("pull", ok=False)
    assert "neither locally nor on remote" in said and "failed to pull" in said
    assert not objects(b.cache)
    b.use(store.url).dvc("pull")
    assert b.data() == a.data() and objects(b.cache) == objects(store.folder) == objects(a.cache)


# Broken

def test_cut_while_pushing(a, store):
    "DVC tries each object again by itself; what a push did not bring, the next one does."
    with bad_line(store.url, Faults(every=1000, most=40, seed=1)) as line:
        a.use(line.url)
        assert any(a.end(a.start("push")) == 0 for _ in range(10))
        assert line.cuts.value >= 5
    assert objects(store.folder) == objects(a.cache)


def test_cut_while_pulling(a, store):
    """What has come is whole, the rest is named, and the next pull brings it. This server sends the checksum of the whole with a
    part of it, too: only if checksums that need not be are not checked does DVC take up an object where it was cut."""
    a.dvc("push")
    with bad_line(store.url, Faults(every=100_000, seed=2)) as line:
        b = clone(a).use(line.url)
        assert "failed to transfer" in b.dvc("pull", ok=False)
        assert objects(b.cache) < objects(store.folder) and line.cuts.value >= 5
        assert any(b.end(b.start("pull", AWS_RESPONSE_CHECKSUM_VALIDATION="when_required")) == 0 for _ in range(10))
    assert b.data() == a.data() and objects(b.cache) == objects(store.folder)


def test_killed_and_resumed(a, store):
    "SIGKILL in the midst of a push, twice, and of a pull: what has come is whole, and only the rest crosses the line again."
    with bad_line(store.url, Faults(delay=0.1)) as line:
        a.use(line.url)
        for count in (3, 6):
            process = a.start("push", "-j", "1")
            wait_for(count, store.folder, process)
            process.kill(), process.join()
        pushed = objects(store.folder)
        assert 6 <= len(pushed) <= FILES and not any(name.endswith(".dir") for name in pushed) # the list of a folder comes last: whoever sees it has all
        a.use(store.url)
        assert f"{FILES + 1 - len(pushed)} files pushed" in a.dvc("push")
        assert objects(store.folder) == objects(a.cache)
        b = clone(a).use(line.url)
        process = b.start("pull", "-j", "1")
        wait_for(4, b.cache, process)
        process.kill(), process.join()
    pulled = objects(b.cache)
    assert 4 <= len(pulled) <= FILES
    assert f"{FILES + 1 - len(pulled)} files fetched" in b.use(store.url).dvc("pull")
    assert b.data() == a.data() and objects(b.cache) == objects(store.folder)


# Full

def test_full_disk(a, store):
    "No room for one object, here and at the server: the others come, the error names it, and later only that one crosses the line."
    a.write("large", 1, 3_000_000)
    a.commit("large")
    a.dvc("push")
    b = clone(a)
    said = b.dvc("pull", ok=False, limit=1_000_000)
    assert "File too large" in said and "2 files failed to download" in said # it, and the list of the folder
    assert len(objects(b.cache)) == FILES
    assert "2 files fetched" in b.dvc("pull")
    assert b.data() == a.data()

    other = store.folder.with_name("other")
    (other/"bucket").mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try: server = serve_s3(other); url = server.__enter__()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with contextlib.ExitStack() as stack:
        stack.push(server)
        said = a.use(url).dvc("push", ok=False, AWS_MAX_ATTEMPTS="1")
        assert "Internal Error" in said and "2 files failed to upload" in said
        assert len(objects(other)) == FILES
    with serve_s3(other) as url:
        assert "2 files pushed" in a.use(url).dvc("push")
        assert objects(other) == objects(store.folder)


# Two at once

def test_two_push_at_once(a, store):
    "They share files and have files of their own; neither waits for the other."
    older, b = {name for name in objects(a.cache) if name.endswith(".dir")}, clone(a)
    b.write("one"), b.write("two", 6), b.commit("two")
    a.write("three", 6), a.commit("three")
    processes = [a.start("push"), b.start("push")]
    assert [machine.end(process) for machine, process in zip((a, b), processes)] == [0, 0]
    assert objects(store.folder) == {*objects(a.cache), *objects(b.cache)} - older
    for machine in (a, b):
        c = clone(machine, f"clone of {machine.home.name}")
        c.dvc("pull")
        assert c.data() == machine.data()


# Gone

def test_gc_and_an_older_commit(a, store):
    """`gc -w` empties a cache of what other commits need: they come back from the remote. `gc -w -c` does the same to the
    remote, for everybody: then only a machine that still has the data can bring them back, with a push from that commit. So
    on a remote that is shared there is no `-c` without `-A` (all commits), which keeps them."""
    one = a.data()
    a.dvc("push")
    b = clone(a)
    b.dvc("pull")
    shutil.rmtree(a.root/"data")
    a.write("two"), a.commit("two")
    a.dvc("push"), a.dvc("gc", "-w", "-f")
    assert len(objects(a.cache)) == FILES + 1 and len(objects(store.folder)) == 2*(FILES + 1)
    a.git("checkout", "-q", "one")
    a.dvc("pull")
    assert a.data() == one
    a.git("checkout", "-q", "main"), a.dvc("checkout")
    a.dvc("gc", "-A", "-c", "-f")
    assert len(objects(a.cache)) == len(objects(store.folder)) == 2*(FILES + 1)
    a.dvc("gc", "-w", "-c", "-f")
    assert objects(store.folder) == objects(a.cache) and len(objects(a.cache)) == FILES + 1
    c = clone(a, "c")
    c.git("checkout", "-q", "one")
    assert "neither locally nor on remote" in c.dvc("pull", ok=False)
    b.dvc("push"), c.dvc("pull")
    assert c.data() == one and len(objects(store.folder)) == 2*(FILES + 1)


def test_damaged_object(a, store):
    """DVC believes what a remote gives: it takes a damaged object into the cache and says nothing, unless the remote has
    `verify = true`. Nor does a push mend it, even when it is taken away: where the list of a folder (.dir) is, DVC asks for none
    of its files. So both go, and whoever has the data pushes."""
    def remove(name): client.delete_object(Bucket="bucket", Key=f"dvc/files/md5/{name[:2]}/{name[2:]}")
    client = botocore.session.Session().create_client("s3", "us-east-1", endpoint_url=store.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET)
    a.dvc("push")
    *names, folder = sorted(objects(store.folder), key=lambda name: (name.endswith(".dir"), name))
    with open(store.folder/"bucket/dvc/files/md5"/names[0][:2]/names[0][2:], "r+b") as f: f.write(b"damaged")
    b, c = clone(a), clone(a, "c").use(store.url, verify=True)
    b.dvc("pull")
    with pytest.raises(AssertionError, match=f"corrupt: .*{names[0]}"): objects(b.cache)
    assert "missing-files" in c.dvc("pull", ok=False)
    assert names[0] not in objects(c.cache)
    remove(names[0])
    assert "in sync" in a.dvc("status", "-c") and "Everything is up to date" in a.dvc("push")
    assert names[0] not in objects(store.folder)
    remove(folder)
    assert "2 files pushed" in a.dvc("push")
    c.dvc("pull")
    assert c.data() == a.data() and objects(c.cache) == objects(store.folder) == objects(a.cache)

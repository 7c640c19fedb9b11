"Bundles released by git tag: fetched on another machine, checked, and refused when they differ from the release."
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from ai2text.serving.bundle import BundleError, check_bundle
from ai2text.pipeline.release import get
from ai2text.testing.s3_faults import KEY, SECRET, Faults, bad_line, serve_s3
from ai2text.data.storage import Server, client
from ai2text.testing.toy_bundle import toy_bundle

DVC_YAML = """
stages:
  export:
    cmd: "true"
    outs: [models/export]
artifacts:
  recogniser: {path: models/export, type: model, desc: what a streaming service runs}
"""


def run(folder, *command):
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "DVC_NO_ANALYTICS": "1",
           "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for who in ("AUTHOR", "COMMITTER"): env |= {f"GIT_{who}_NAME": "t", f"GIT_{who}_EMAIL": "t@t"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project(folder, url, bundles):
    "A repository with a released bundle per version, pushed to the S3 server; the bundles differ in the words they recognise."
    folder.mkdir()
    run(folder, "git", "init", "-q", "-b", "main")
    (folder/".dvc").mkdir()
    (folder/".dvc/config").write_text(f"[core]\n    remote = far\n['remote \"far\"']\n    url = s3://bucket/dvc\n    endpointurl = {url}\n")
    (folder/"dvc.yaml").write_text(DVC_YAML)
    (folder/".gitignore").write_text("/models\n/.dvc/cache\n/.dvc/tmp\n/.dvc/config.local\n")
    run(folder, "git", "add", "-A"), run(folder, "git", "commit", "-qm", "nothing yet")
    run(folder, "git", "tag", "recogniser@v0.1.0")
    for version, deaf in bundles.items():
        toy_bundle(folder/"models/export", deaf=deaf)
        run(folder, "dvc", "commit", "-q", "-f"), run(folder, "git", "add", "-A"), run(folder, "git", "commit", "-qm", version)
        run(folder, "dvc", "push", "-q"), run(folder, "gto", "register", "recogniser", "--version", version)
    return folder


def content(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}
def bundles(folder): return sorted(p.name for p in folder.iterdir() if "recogniser" in p.name)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    "A server; a repository with two releases, and a tag on a commit without a bundle; the keys are in the environment."
    folder = tmp_path_factory.mktemp("registry")
    (folder/"store/bucket").mkdir(parents=True)
    with serve_s3(folder/"store") as url, pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET)): patch.setenv(name, value)
        yield SimpleNamespace(
            url=url, s3=client(Server(url, key=KEY, secret=SECRET)), home=project(folder / "home", url, {"v1.0.0": (), "v1.1.0": ("hai",)})
        )


@pytest.fixture
def clone(far, tmp_path):
    "Another machine: a clone with an empty cache."
    run(tmp_path, "git", "clone", "-q", str(far.home), str(tmp_path/"clone"))
    return tmp_path/"clone"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def local_config(repo, **values):
    (repo/".dvc/config.local").write_text("['remote \"far\"']\n" + "".join(f"    {k} = {v}\n" for k, v in values.items()))


def test_releases_are_fetched_and_checked(far, clone, here, capsys):
    newest = content(far.home/"models/export")
    assert get("recogniser@v1.0.0", str(clone)) == Path("recogniser-v1.0.0")
    assert "recogniser-v1.0.0: recogniser v1.0.0, fetched and checked" in capsys.readouterr().err
    assert get("recogniser", str(clone)) == Path("recogniser-v1.1.0") and content("recogniser-v1.1.0") == newest
    first = content("recogniser-v1.0.0")
    assert first["model.onnx"] != newest["model.onnx"] and check_bundle("recogniser-v1.0.0").config["name"] == "toy"
    assert content(get("recogniser@v1.0.0", f"file://{far.home}", here/"a/b")) == first # by URL, without a clone
    assert content(get("HEAD~1", str(clone), here/"c")) == first
    assert bundles(here) == ["recogniser-v1.0.0", "recogniser-v1.1.0"]

    # A second time
    stamp = Path("recogniser-v1.0.0/model.onnx").stat().st_mtime_ns
    get("recogniser@v1.0.0", str(clone))
    assert "already there, the same" in capsys.readouterr().err and Path("recogniser-v1.0.0/model.onnx").stat().st_mtime_ns == stamp
    with pytest.raises(
        BundleError,
        match="recogniser-v1.0.0: is there already, and SHA256SUMS, model.int8.onnx, .* are not as in recogniser of .*; move it away",
    ):
        get("recogniser", str(clone), Path("recogniser-v1.0.0"))
    Path("recogniser-v1.0.0/mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="mine.txt is not as in"): get("recogniser@v1.0.0", str(clone))
    assert content("recogniser-v1.0.0") == first | {"mine.txt": b"mine"}


@pytest.mark.slow
def test_missing_releases_and_remotes_are_errors(far, clone, here):
    def refused(text, tag="recogniser", repo=clone, **more):
        with pytest.raises(BundleError, match=text): get(tag, str(repo), **more)
        assert not bundles(here) and not [p for p in here.iterdir() if p.name.startswith(".")]

    refused(
        r"recogniser@v2.0.0: no such release; there are recogniser@v1.1.0, recogniser@v1.0.0, recogniser@v0.1.0; `git fetch --tags`",
        "recogniser@v2.0.0",
    )
    refused("nothing of .*: neither a release nor a git revision; there are recogniser@v1.1.0", "nothing")
    refused("recogniser@v0.1.0 of .*: no folder models/export in its dvc.lock; `dvc repro` and commit", "recogniser@v0.1.0")
    refused("no git repository was found|Only supported for Git repositories", repo=here)
    refused("(?i)no git repository was found at", repo=here/"nowhere")
    refused("no remote 'near' in its .dvc/config; there are far", remote="near")
    local_config(clone, access_key_id=KEY, secret_access_key="wrong")
    refused("recogniser of .*: DVC's remote 'far' does not give it: .*Forbidden.*; check its address and keys")
    (clone/".dvc/config.local").unlink()
    (clone/"dvc.yaml").write_text(DVC_YAML.partition("artifacts")[0])
    run(clone, "git", "commit", "-qam", "no name")
    refused("main of .*: its dvc.yaml has no artifact 'recogniser'; add it to `artifacts`", "main")


@pytest.mark.slow
def test_a_corrupt_remote_is_refused(far, clone, here):
    "Other bytes, another consistent bundle, another list of files, a missing object: none is accepted as the release."
    def lock(rev): return YAML(typ="safe").load(run(far.home, "git", "show", f"{rev}:dvc.lock"))["stages"]["export"]["outs"][0]["md5"]
    def key(md5): return f"dvc/files/md5/{md5[:2]}/{md5[2:]}"
    def read(md5): return far.s3.get_object(Bucket="bucket", Key=key(md5))["Body"].read()
    old, new = lock("recogniser@v1.0.0"), lock("recogniser@v1.1.0")
    files, others = ({row["relpath"]: row["md5"] for row in json.loads(read(o))} for o in (old, new))
    kept = {md5: read(md5) for md5 in [old, *files.values()]}

    def refused(text, **changes):
        for md5, data in changes.items(): far.s3.put_object(Bucket="bucket", Key=key(md5), Body=data)
        try:
            with pytest.raises(BundleError, match=text): get("recogniser@v1.0.0", str(clone))
        finally:
            for md5 in changes: far.s3.put_object(Bucket="bucket", Key=key(md5), Body=kept[md5])
        assert not bundles(here) and not [p for p in here.iterdir() if p.name.startswith(".")]
    refused("from the remote 'far': the list of its files is not what git says; remove it there and `dvc push` again", **{old: read(new)})
    refused(
        r"from the remote 'far': model\.(int8\.)?onnx: arrived with MD5 \w+, not \w+; remove it there and `dvc push` again",
        **{files["model.onnx"]: kept[files["model.onnx"]][:-1] + b"x"},
    )
    refused(
        "from the remote 'far': [\\w.]+: arrived with MD5",
        **{files[name]: read(others[name]) for name in files if files[name] != others[name]},
    )
    refused("is larger than the 65536 bytes of a bundle", **{files["SHA256SUMS"]: bytes(1 << 17)})
    far.s3.delete_object(Bucket="bucket", Key=key(files["tokens.txt"]))
    refused("remote 'far' does not give it: .*; check its address and keys .* or `dvc push` it from where it was made")
    far.s3.put_object(Bucket="bucket", Key=key(files["tokens.txt"]), Body=kept[files["tokens.txt"]])
    assert check_bundle(get("recogniser@v1.0.0", str(clone)))


@pytest.mark.slow
def test_a_broken_connection_leaves_a_whole_bundle_or_nothing(far, clone, here):
    "A bundle is fetched completely, or not at all."
    with bad_line(far.url, Faults(every=3000, most=1)) as line:
        local_config(clone, endpointurl=line.url)
        get("recogniser", str(clone))
        assert line.cuts.value

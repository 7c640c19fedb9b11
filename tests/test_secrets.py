"""No credentials are tracked: neither in files that git has or would add, nor in any reachable commit.

The likely leaks here are S3 keys in notebook cells, their outputs and DVC commands. detect-secrets 1.5.0 found 2 of 8 such keys and 8 of the 20
planted below, does not scan the history, and took 28 s (this: 5 s); its entropy search reports hashes, cell ids and pictures.
"""
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from workspace import environment

# Kind, a word that every match contains, pattern; optionally a pattern of file names.
RULES = [
    ("AWS key id", b"AKIA", rb"\bAKIA[0-9A-Z]{16}\b"),
    ("AWS key id of a session", b"ASIA", rb"\bASIA[0-9A-Z]{16}\b"),
    ("AWS secret key", b"secret", rb"(?i)secret[\w ]{0,20}[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
    ("S3 secret in code", b"secret", rb"(?i)secret(?:_access)?_?key(?:\\?[\"'])?\s*[=:]\s*\\?[\"'][^\s\"'\\$<>{}()]{6,}\\?[\"']"),
    ("S3 secret of a shell", b"secret", rb"\bAWS_SECRET_ACCESS_KEY=[\"']?[^\s\"'\\$<>{}(),`]{6,}(?=[\s\"'\\`]|\Z)"),
    ("S3 secret of a shell", b"remote modify", rb"remote modify[^\n]* (?:secret_access_key|password)[ =][\"']?[^\s\"'\\$<>{}(),`]{6,}"),
    ("password of a setting", b"",
     rb"(?i)^[ \t]*(?:export[ \t]+)?[\w.-]*(?:access_key_id|access_key|account_key|secret|token|password|connection_string)"
     rb"[ \t]*[=:][ \t]*(?!\$)[^\s#]+",
         r"(^|/)\.dvc/|(^|/)(\.env[^/]*|\.netrc|\.pypirc|credentials|config|config\.local|rclone\.conf)$"),
    ("private key", b"PRIVATE KEY", rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"),
    ("GitHub token", b"gh", rb"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    ("GitHub token", b"github_pat_", rb"\bgithub_pat_[A-Za-z0-9_]{30,}"),
    ("GitLab token", b"glpat-", rb"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("Hugging Face token", b"hf_", rb"\bhf_[A-Za-z0-9]{30,}"),
    ("Slack token", b"xox", rb"\bxox[a-z]-[A-Za-z0-9-]{10,}"),
    ("PyPI token", b"pypi-", rb"\bpypi-[A-Za-z0-9_-]{50,}"),
    ("Google key", b"AIza", rb"\bAIza[A-Za-z0-9_-]{35}\b"),
    ("signed token", b"eyJ", rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    ("password in a URL", b"://", rb"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>{}$*]+:[^\s/:@\"'<>{}$*]{3,}@"),
]
NEVER = re.compile(r"(^|/)(config\.local|\.env|\.netrc|\.pypirc|credentials|id_(rsa|dsa|ecdsa|ed25519))$|\.(pem|key|p12|pfx|jks|ppk)$")
# Credentials of the local S3 server of tests and documentation (MinIO on localhost).
ALLOWED = re.compile(rb"(?:[=: ][ \t]*\\?[\"']?|://)(?:minio|minio123|minio:minio123@)\\?[\"']?$")


def git(folder, *words)->bytes: return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True).stdout


def keys(name:str, data:bytes)->list:
    "The kinds of keys in a text, with their lines; the keys themselves are not shown."
    found, low = [f"{name}: a file of this name contains keys"] if NEVER.search(name) else [], data.lower()
    for kind, word, pattern, *files in RULES:
        if word.lower() not in low or files and not re.search(files[0], name): continue
        hits = [hit for hit in re.finditer(pattern, data, re.MULTILINE) if not ALLOWED.search(hit[0].strip())]
        found += [f"{name}, line {data.count(10, 0, hit.start()) + 1}: {kind}" for hit in hits]
    return found


def in_tree(folder)->list:
    "Keys in files that git has or would add."
    names = git(folder, "ls-files", "-z", "-co", "--exclude-standard").decode("utf-8", "surrogateescape").split("\0")
    paths = {name: Path(folder)/name for name in names if name}
    return [k for name, path in paths.items() if path.is_file() and not path.is_symlink() for k in keys(name, path.read_bytes())]


def in_history(folder)->list:
    "Keys in all changes, messages and tags reachable from a branch, tag or stash; in a shallow clone, of its commits."
    found = keys("tag", git(folder, "for-each-ref", "--format=%(contents)", "refs/tags"))
    log = git(folder, "-c", "core.quotePath=false", "log", "--all", "-p", "-U0", "-m", "--text", "--no-renames",
              "--format=%x1ecommit%x1e%h%n%B")
    for commit in log.split(b"\x1ecommit\x1e")[1:]:
        message, *changes = re.split(rb"(?m)^diff --git a/.* b/(.*)\n", commit)
        for name, text in [(b"message", message), *zip(changes[::2], changes[1::2])]:
            text = re.sub(rb"(?m)^[+-]", b"", text)
            found += [f"{message.split()[0].decode()} {k}" for k in keys(name.decode("utf-8", "surrogateescape"), text)]
    return found


FIX = "revoke and remove them; keys belong in the environment, a profile, or .dvc/config.local (`dvc remote modify --local`)"


def test_no_key_is_tracked():
    assert not (found := in_tree(ROOT)), f"keys in {found}: {FIX}"


def test_no_key_is_in_the_history():
    assert not (found := in_history(ROOT)), f"keys in {found}: {FIX}; the commits need `git filter-repo`"


# The scanner

@pytest.fixture
def repository(tmp_path):
    "A git repository with one commit and the project's settings of DVC and git."
    for name in (".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@x.invalid", "commit", "-q", "--allow-empty", "-m", "a change")


# Concatenated, so that this file is not reported itself.
LONG = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7Op8Qr9St0Uv1Wx2Yz3A"
PLANTED = {
    "AWS key id": ("a.py", "key = 'AK" + "IAABCDEFGHIJ234567'"),
    "AWS key id of a session": ("a.md", "AS" + "IAABCDEFGHIJ234567"),
    "AWS secret key": ("a.json", '{"Secret' + f'AccessKey": "{LONG}"}}'),
    "S3 secret in code": ("a.ipynb", '{"source": ["s3(secret_access' + '_key=\\"not-minio\\")"]}'),
    "S3 secret of a shell": ("a.sh", "export AWS_SECRET_ACCESS" + "_KEY=not-minio"),
    "S3 secret of DVC": ("README.md", "dvc remote" + " modify s3 secret_access_key not-minio"),
    "password of DVC": (".dvc/config", "['remote \"s3\"']\n    pass" + "word = x"),
    "password of a setting": ("deploy/.env.prod", "export AI2TEXT_TO" + "KEN=x"),
    "private key": ("a.txt", "-----BEGIN OPENSSH PRIV" + "ATE KEY-----"),
    "GitHub token": ("a.yml", "gh" + f"p_{LONG}"),
    "GitHub token, fine": ("a.yml", "github" + f"_pat_{LONG}"),
    "GitLab token": ("a.yml", "glp" + f"at-{LONG}"),
    "Hugging Face token": ("a.py", "h" + f"f_{LONG}"),
    "Slack token": ("a.py", "xo" + "xb-1234567890-abc"),
    "PyPI token": ("a.cfg", "py" + f"pi-{LONG}{LONG}"),
    "Google key": ("a.js", "AI" + f"za{LONG[:35]}"),
    "signed token": ("a.txt", ".".join(["ey" + f"J{LONG}"]*2 + [LONG])),
    "password in a URL": ("a.yaml", "s3: https://minio:another" + "@10.0.0.1:9000"),
    "a file of keys": ("deploy/server.key", "some text"),
    "the local settings of DVC": (".dvc/config.local", "some text"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_key_is_found(kind, repository):
    "In the tree, in the index, and in the history after its removal; the report has place and kind, not the key."
    name, text = PLANTED[kind]
    assert in_tree(repository) == in_history(repository) == []
    path = repository/name
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"one line\n{text}\n")
    git(repository, "add", "-f", name)
    found = in_tree(repository)
    assert found and found[0].startswith(name) and not any(text in o for o in found), found
    commit(repository)
    path.unlink() if before is None else path.write_bytes(before)
    commit(repository)
    assert in_tree(repository) == [] and (found := in_history(repository)) and any(name in o for o in found)


def test_a_key_in_a_message_or_a_tag_is_found(repository):
    git(repository, "-c", "user.name=n", "-c", "user.email=e@x.invalid", "tag", "-a", "v1", "-m", PLANTED["GitHub token"][1])
    assert [o.split(",")[0] for o in in_history(repository)] == ["tag"]


def test_development_credentials_variables_and_placeholders_are_allowed(repository):
    (repository/"README.md").write_text("""
        AWS_ACCESS_KEY_ID=minio AWS_SECRET_ACCESS_KEY=minio123 dvc push
        export AWS_SECRET_ACCESS_KEY="$SECRET"
        dvc remote modify --local minio secret_access_key minio123
        dvc remote modify --local s3 secret_access_key <yours>
        client(aws_secret_access_key=server.secret) dict(AWS_SECRET_ACCESS_KEY=SECRET, more=1)
        http://minio:minio123@localhost:9000 https://user:$PASSWORD@host https://user@host
    """)
    assert in_tree(repository) == []


def test_dvc_remote_modify_local_is_not_tracked(repository):
    "With `--local` git ignores the key; without it the key is found."
    def modify(*how): subprocess.run(["dvc", "remote", "modify", *how, "s3", "secret_access_key", "not-minio"], cwd=repository, check=True,
                                     capture_output=True, env=environment())
    modify("--local")
    assert "not-minio" in (repository/".dvc/config.local").read_text()
    assert git(repository, "status", "--porcelain") == b"" and in_tree(repository) == []
    modify()
    [found] = in_tree(repository)
    assert found.startswith(".dvc/config, line ") and found.endswith(": password of a setting")

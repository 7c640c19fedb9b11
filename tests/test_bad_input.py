"Bad input, a full disk, a killed process: a clear error or a counted reject, no partial output taken as whole; the next run continues."

import itertools
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile

from ai2text.pipeline.cli import main
from ai2text.core.files import read_json, read_jsonl, sha256
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.corpora.corpus import IMPORT_REASONS, make_corpus
from ai2text.core.sections import CorpusConfig
from ai2text.data.loader import create_webdataset_loader
from ai2text.corpora.checks import SPLITS
from ai2text.core.sections import PrepareConfig
from ai2text.corpora.prepare import prepare
from ai2text.data.shard_index import load_index
from ai2text.core.sections import ShardsConfig
from ai2text.data.shards import verify, write_shards
from workspace import ROOT, M, Workspace, environment

DIGITS = "không một hai ba bốn năm sáu bảy tám chín".split()
JUNK = b"RIFF, but no audio"
SMALL = ShardsConfig(shard_size=5, codec="wav", processes=1)


def release(folder:Path, **speakers)->Path:
    "A folder of Common Voice: SPLIT=speakers, four clips of a second each, no text twice."
    (folder/"clips").mkdir(parents=True)
    numbers = itertools.count(1)
    for split, names in speakers.items():
        lines = ["client_id\tpath\tsentence"]
        for name in names:
            for number in itertools.islice(numbers, 4):
                soundfile.write(folder/f"clips/{number}.wav", 0.1*np.sin(np.arange(16_000)*0.02*number), 16_000)
                lines.append(f"{name}\t{number}.wav\t" + " ".join(DIGITS[int(d)] for d in f"{number:03}"))
        (folder/f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def add(folder:Path, *lines:bytes):
    with open(folder/"train.tsv", "ab") as f: f.writelines(line + b"\n" for line in lines)


def corpus(source:Path, root:Path)->Layout:
    make_corpus(CorpusConfig(source="common_voice", path=str(source), processes=1), "cv", Layout(root).corpus("cv"), root)
    return Layout(root)


def prepared(layout:Layout, **changes)->dict:
    return prepare(PrepareConfig(**dict(dict(tokenizer="char", processes=1), **changes)), layout.corpora, layout.prepared)


def sharded(layout:Layout, split:str, config=SMALL):
    return write_shards(
        read_jsonl(layout.manifest(split)), layout.split_shards(split), layout.split_index(split), config, audio_root=layout.prepared
    )


def killed(code:str, cwd:Path):
    "Run `code` in a process that ends itself with SIGKILL by calling `die` for the third time."
    head = "import os\ncalls = []\ndef die():\n    calls.append(1)\n    if len(calls) == 3: os.kill(os.getpid(), 9)\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], cwd=cwd, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr


def contents(folder:Path)->dict: return {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


# Rows and recordings that cannot be used

def test_bad_rows_are_counted_with_their_reasons(tmp_path):
    source = release(tmp_path/"cv", train=["a", "b", "c"], dev=["d"], test=["e"])
    (source/"clips/junk.wav").write_bytes(JUNK)
    (source/"clips/empty.wav").touch()
    soundfile.write(source/"clips/cut.flac", soundfile.read(source/"clips/1.wav")[0], 16_000)
    os.truncate(source/"clips/cut.flac", (source/"clips/cut.flac").stat().st_size//2)
    for name, hertz in (("dots", 301), ("digits", 403)):
        soundfile.write(source / f"clips/{name}.wav", 0.1 * np.sin(np.arange(16_000) * hertz / 1000), 16_000)
    add(
        source, b"a\tonly two columns", b"a\t1.wav\t\xff\xfe", b"a\tgone.wav\tmai", b"a\tjunk.wav\tmai",
        b"a\tempty.wav\tmai", b"a\t1.wav\tmai", b"a\t../../etc/passwd\tmai", b"a\tdots.wav\t ", b"\tdots.wav\t?!...",
        b"\tdigits.wav\t21", b"a\tcut.flac\tmai mai"
    )
    layout = corpus(source, tmp_path)
    reasons = Counter(r["reason"] for r in read_jsonl(layout.corpus("cv")/"rejects.jsonl"))
    assert reasons == {"wrong number of columns": 1, "not UTF-8": 1, "audio not found": 1, "unreadable audio": 2, "duplicate id": 1,
                       "outside of the folder": 1, "empty transcript": 1}
    assert all(r["file"] == "train.tsv" and r["line"] > 13 for r in read_jsonl(layout.corpus("cv")/"rejects.jsonl"))
    stats = prepared(layout, max_reject_share=0.5)
    assert {k: n for k, n in stats["rejects"].items() if n} == {"empty transcript": 1, "truncated": 1}
    assert stats["utterances"] == 23 and sum(s["utterances"] for s in stats["splits"].values()) == 21
    read_out = next(r for split in SPLITS for r in read_jsonl(layout.manifest(split)) if r["id"] == "cv-digits")
    assert (read_out["text"], read_out["speaker"]) == ("hai mươi mốt", "")
    (source/"clips/3.wav").write_bytes(JUNK) # after it was prepared
    index = sharded(layout, "train", ShardsConfig(shard_size=5, processes=1, max_reject_share=0.2))
    assert len(index) == 12 and [r["id"] for r in load_index(layout.split_index("train")).rejected] == ["cv-3"]
    with pytest.raises(
        ConfigError, match=r"1 of 13 recordings rejected, more than max_reject_share = 0.01 allows: .*not readable as audio.* \(as 'cv-3'\)"
    ):
        sharded(layout, "train")
    assert not layout.split_index("train").exists()


def test_too_many_bad_rows_stop_prepare(tmp_path):
    source = release(tmp_path/"cv", train=["a", "b"], dev=["d"], test=["e"])
    for n in (1, 2, 3): soundfile.write(source/f"clips/{n}.wav", np.zeros(16_000), 16_000)
    layout = corpus(source, tmp_path)
    with pytest.raises(
        ConfigError, match=r"3 of 16 utterances rejected \(3 silent\): more than max_reject_share 0.1; read .*rejects.jsonl"
    ):
        prepared(layout)
    assert [p.name for p in layout.prepared.iterdir()] == ["rejects.jsonl"]


def test_empty_split_stops_prepare_and_leaves_no_manifest(tmp_path):
    whole, poor = (release(tmp_path/name, train=["a", "b"], dev=["d"], test=["e"]) for name in ("whole", "poor"))
    for n in range(9, 13): soundfile.write(poor/f"clips/{n}.wav", np.zeros(16_000), 16_000)
    layout = corpus(whole, tmp_path)
    prepared(layout)
    corpus(poor, tmp_path)
    with pytest.raises(
        ConfigError,
        match="split dev is empty: 4 of its utterances were rejected, and 3 speakers are left in all; give the corpus a dev "
              "split or more speakers",
    ):
        prepared(layout, max_reject_share=0.5)
    assert not any(layout.manifest(split).exists() for split in SPLITS) and not (layout.prepared/"stats.json").exists()
    with pytest.raises(ConfigError, match="an empty split cannot be sharded"):
        write_shards([], layout.split_shards("dev"), layout.split_index("dev"), audio_root=tmp_path)
    corpus(whole, tmp_path)
    assert prepared(layout)["splits"]["dev"]["utterances"] == 4


def test_one_speaker_without_dev_is_split_by_utterance_and_noted_in_every_file(tmp_path):
    layout = corpus(release(tmp_path/"cv", train=["a"], test=["e"]), tmp_path)
    stats = prepared(layout)
    assert {split: s["utterances"] for split, s in stats["splits"].items()} == dict(train=3, dev=1, test=4)
    assert stats["drawn_by_utterance"] == ["dev"]
    assert stats["caveats"] == [
        "the speakers of 100% of the utterances of dev are in train too: this error rate is too low for other speakers"
    ]
    assert [r.get("seen") for r in read_jsonl(layout.manifest("dev"))] == [["speaker"]]
    assert (
        sharded(layout, "dev").seen == load_index(layout.split_index("dev")).seen == dict(speaker=1.0)
        and sharded(layout, "test").seen == {}
    )


def test_rejected_split_is_not_drawn_from_another(tmp_path):
    source = release(tmp_path/"cv", train=["a", "b", "c"], dev=["d"], test=["e"])
    for n in range(13, 17): soundfile.write(source/f"clips/{n}.wav", np.zeros(16_000), 16_000)
    layout = corpus(source, tmp_path)
    with pytest.raises(ConfigError, match=r"split dev is empty: 4 of its utterances were rejected, .*\(rejected: 4 silent\)"):
        prepared(layout, max_reject_share=0.5)
    before = contents(layout.corpora)
    for n in range(13, 17): (source/f"clips/{n}.wav").unlink()
    with pytest.raises(
        ConfigError,
        match=r"corpora.cv: .*cv: split dev has no usable utterance; 4 rejected; dev.tsv, line 2: audio not found, "
              r"clips/13.wav; .*Fix them, or remove the split",
    ):
        corpus(source, tmp_path)
    assert contents(layout.corpora) == before
    (source/"dev.tsv").unlink()
    assert prepared(corpus(source, tmp_path))["splits"]["dev"]["utterances"] == 4


# Bad inputs as three corpora, from import to the loader

NUMBERS = itertools.count(100)
WRITTEN, MISSING = object(), object() # a good transcript, unlike all others; no transcript


def spoken_digits(number:int)->str: return " ".join(DIGITS[int(d)] for d in f"{number:03}")


def tone(seconds=1., rate=16_000, channels=1, change=lambda wave: wave, **form):
    "A recording unlike all others; `change` corrupts it."
    def make(path, number):
        time_T1 = np.arange(int(seconds*rate))[:, None]/rate
        with open(path, "wb") as f:
            soundfile.write(
                f, change(0.3 * np.sin(2 * np.pi * (200 + 7 * number) * time_T1).repeat(channels, 1)), rate, **(dict(format="WAV") | form)
            )

    return make


def cut(share=0.6, **form):
    def make(path, number):
        tone(4., **form)(path, number)
        os.truncate(path, int(os.path.getsize(path)*share))
    return make


def hours(path, number):
    "Three hours as a sparse file."
    count = 3*3600*8000
    path.write_bytes(
        b"RIFF"
        + (36 + count).to_bytes(4, "little")
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
        + b"data"
        + count.to_bytes(4, "little")
    )
    os.truncate(path, 44 + count)


def raw(content:bytes): return lambda path, number: path.write_bytes(content)
def link(target:str): return lambda path, number: path.symlink_to(target)
def put(value): return lambda wave: np.concatenate([wave[:100], np.full_like(wave[:1], value), wave[101:]])
def copy_of(name:str): return lambda path, number: soundfile.write(path, *soundfile.read(path.with_name(name), dtype="int16"))
def locked(path, number): tone()(path, number), path.chmod(0)
def nothing(path, number): pass


# description, file name, writer, transcript, expected reason or "works" (a list for several rows), sources (default: all)
GOOD = tone()
BAD = [
    ("zero bytes", "zero.wav", raw(b""), WRITTEN, "unreadable audio"),
    ("truncated FLAC", "half flac.flac", cut(format="FLAC"), WRITTEN, "truncated"),
    ("truncated MP3", "half mp3.mp3", cut(format="MP3"), WRITTEN, "truncated"),
    ("truncated WAV", "half wav.wav", cut(), WRITTEN, "truncated"),
    ("WAV without its last 40 ms", "end wav.wav", cut(0.99), WRITTEN, "truncated"),
    ("text named .wav", "text.wav", raw(b"xin ch\xc3\xa0o\n"*99), WRITTEN, "unreadable audio"),
    ("no samples", "none.wav", tone(0.), WRITTEN, "unreadable audio"),
    ("8 bits", "8bit.wav", tone(subtype="PCM_U8"), WRITTEN, "works"),
    ("24 bits", "24bit.wav", tone(subtype="PCM_24"), WRITTEN, "works"),
    ("float", "float.wav", tone(subtype="FLOAT"), WRITTEN, "works"),
    ("mu-law", "law.wav", tone(subtype="ULAW"), WRITTEN, "works"),
    ("MP3", "whole.mp3", tone(4., format="MP3"), WRITTEN, "works"),
    ("96 kHz", "96.wav", tone(rate=96_000), WRITTEN, "works"),
    ("8 kHz", "8.wav", tone(rate=8_000), WRITTEN, "works"),
    ("6 channels", "six.wav", tone(channels=6), WRITTEN, "works"),
    ("NaN", "nan.wav", tone(subtype="FLOAT", change=put(np.nan)), WRITTEN, "not finite"),
    ("infinity", "inf.wav", tone(subtype="FLOAT", change=put(-np.inf)), WRITTEN, "not finite"),
    ("3 hours", "hours.wav", hours, WRITTEN, "too long"),
    ("silence", "silence.wav", tone(change=np.zeros_like), WRITTEN, "silent"),
    ("clipped", "clipped.wav", tone(change=lambda wave: (9*wave).clip(-1, 1)), WRITTEN, "clipped"),
    ("DC", "dc.wav", tone(change=lambda wave: np.full_like(wave, 0.4)), WRITTEN, "silent"),
    ("one sample", "one.wav", tone(1/16_000), WRITTEN, "too short"),
    ("0.1 s", "short.wav", tone(0.1), WRITTEN, "too short"),
    ("spaces in the name", "một hai  ba.wav", GOOD, WRITTEN, "works"),
    ("quotes", """it's "so" `$(id)` & \\n.wav""", GOOD, WRITTEN, "works"),
    ("newline", "first\nsecond\r\n.wav", GOOD, WRITTEN, "works"),
    ("NFD", unicodedata.normalize("NFD", "tiếng việt.wav"), GOOD, WRITTEN, "works"),
    ("emoji", "😀🇻🇳.wav", GOOD, WRITTEN, "works"),
    ("leading dash", "-rf.wav", GOOD, WRITTEN, "works"),
    ("255 bytes", "x"*251 + ".wav", GOOD, WRITTEN, "works"),
    ("longer than any name", "y"*300 + ".wav", nothing, WRITTEN, "audio not found", "json nemo"),
    ("name in Latin-1", os.fsdecode(b"caf\xe9.wav"), GOOD, WRITTEN, "not UTF-8"),
    ("NUL in the name", "nul\0.wav", nothing, WRITTEN, "audio not found", "json nemo"),
    ("..", "../outside.wav", nothing, WRITTEN, "outside of the folder", "json nemo"),
    ("absolute path", "{outside}/outside.wav", nothing, WRITTEN, "outside of the folder", "json nemo"),
    ("absolute path of the system", "/etc/passwd", nothing, WRITTEN, "outside of the folder", "json nemo"),
    ("link out of the folder", "link.wav", link("../outside.wav"), WRITTEN, "outside of the folder"),
    ("link in a circle", "circle.wav", link("circle.wav"), WRITTEN, "audio not found"),
    ("a folder named .wav", "folder.wav", lambda path, number: path.mkdir(), WRITTEN, "audio not found", "json nemo"),
    ("a named pipe", "pipe.wav", lambda path, number: os.mkfifo(path), WRITTEN, "audio not found"),
    ("no permission", "locked.wav", locked, WRITTEN, "works" if os.geteuid() == 0 else "unreadable audio"),
    ("an id twice", "twice.wav", GOOD, (WRITTEN, WRITTEN), ["duplicate id", "works"], "json"),
    ("a recording twice", "again.wav", GOOD, (WRITTEN, WRITTEN), ["duplicate id", "works"], "nemo"),
    ("the same audio and text, first", "same1.wav", GOOD, "không", "works", "folder"),
    ("the same audio and text, second", "same2.flac", copy_of("same1.wav"), "Không!", "duplicate audio", "folder"),
    ("the same audio, another text", "other1.wav", GOOD, "một", "audio with two texts", "folder"),
    ("the same audio, and its other text", "other2.wav", copy_of("other1.wav"), "hai", "audio with two texts", "folder"),
    ("BOM", "bom.wav", GOOD, "\ufeffmai có bom", "works"),
    ("CRLF", "crlf.wav", GOOD, "mai xuống\r\ndòng\r\n", "works"),
    ("empty lines", "lines.wav", GOOD, "\n\n mai cách\n\n\ndòng \n\n", "works"),
    ("UTF-16", "utf16.wav", GOOD, "xin chào".encode("utf-16"), "works", "folder"),
    ("Latin-1", "latin.wav", GOOD, "voilà".encode("latin-1"), "not UTF-8", "folder"),
    ("half of a surrogate pair", "half.wav", GOOD, "mai \ud800 mai", "not UTF-8"),
    ("HTML", "html.wav", GOOD, "<b>mai</b> <script>alert(1)</script>", "markup"),
    ("entities", "entities.wav", GOOD, "mai &amp; ba&nbsp;bốn", "markup"),
    ("no transcript", "alone.wav", GOOD, MISSING, "no transcript", "folder nemo"),
    ("empty transcript", "empty.wav", GOOD, "", "empty transcript"),
    ("blanks", "blanks.wav", GOOD, " \t\u00a0\u3000\n", "empty transcript"),
    ("punctuation", "dots.wav", GOOD, "?!... — “”", "empty transcript"),
    ("Cyrillic", "cyrillic.wav", GOOD, "Привет мир", "wrong script"),
    ("Chinese", "chinese.wav", GOOD, "你好世界", "wrong script"),
    ("emoji in the text", "smile.wav", GOOD, "mai vui 😀 quá", "works"),
    ("10,000 letters", "long.wav", GOOD, "mai "*2500, "too fast"),
    ("digits", "digits.wav", GOOD, "mai {number}", "works"),
    ("NUL in the text", "zero-byte.wav", GOOD, "mai\0mai", "unknown characters"),
    ("a number for a text", "number.wav", GOOD, 2021, "no transcript", "json nemo"),
    ("null for a text", "null.wav", GOOD, None, "no transcript", "json nemo"),
    ("a list for a text", "list.wav", GOOD, ["mai"], "no transcript", "json nemo"),
    ("an unknown split", "holdout.wav", GOOD, dict(text="mai", split="holdout"), "unknown split", "json"),
    ("an empty transcript in a split of another name", "valid.wav", GOOD, dict(text="", split="valid"), "empty transcript", "json"),
    ("null for a name", None, nothing, WRITTEN, "audio not found", "nemo"),
    ("a number for a name", 7, nothing, WRITTEN, "audio not found", "nemo")]
assert len(BAD) > 40


def stem(name:str)->str: return unicodedata.normalize("NFC", os.path.splitext(name)[0]).strip()


def bad_corpus(kind:str, folder:Path)->tuple[dict, dict]:
    "Four good recordings for each split and all bad ones: stem or line -> description, and (kind, description) -> expected reasons."
    entries, known, wanted = [], {}, {}
    def add(what, name, make, texts, expected, **more):
        number = next(NUMBERS)
        if isinstance(name, str):
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            make(folder/name, number)
            known[stem(name.encode("utf-8", "backslashreplace").decode())] = what
        for text in texts:
            text = spoken_digits(number) if text is WRITTEN else text.replace("{number}", str(number)) if isinstance(text, str) else text
            entries.append((name, text, more))
            known[len(entries)] = what
        wanted[kind, what] = expected if isinstance(expected, list) else [expected]

    for split, n in itertools.product(SPLITS, range(4)):
        add(f"good {split} {n}", f"{split}/{split}er/{n}.wav", GOOD, [WRITTEN], "works", split=split, speaker=f"{split}er")
    for what, name, make, text, expected, *sources in BAD:
        if kind not in " ".join(sources or ["folder json nemo"]): continue
        name = name.format(outside=folder.parent) if isinstance(name, str) else name
        add(what, name, make, text if isinstance(text, tuple) else [text], expected[kind] if isinstance(expected, dict) else expected)
    if kind == "nemo":
        lines = [
            json.dumps(dict(audio_filepath=name, **more) | ({} if text is MISSING else dict(text=text))) for name, text, more in entries
        ]
        (folder/"list.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n")
    elif kind == "json":
        lines = [f"{json.dumps(name)}: {json.dumps(dict(text=text, **more) if more else text)}" for name, text, more in entries]
        (folder/"list.json").write_text("\ufeff{" + ",\r\n".join(lines) + "}", "utf-8")
    else:
        for name, text, _ in entries:
            if text is not MISSING:
                (folder / name).with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return known, wanted


def test_bad_inputs_are_counted_with_a_reason_or_work(tmp_path):
    layout, wanted, found = Layout(tmp_path/"work"), {}, {}
    tone()(tmp_path/"outside.wav", 0)
    (tmp_path/"outside.txt").write_text("mai", "utf-8")
    known = {}
    for kind, more in dict(folder={}, json=dict(transcripts="list.json"), nemo=dict(transcripts="list.jsonl")).items():
        known[kind], expected = bad_corpus(kind, tmp_path/kind)
        wanted |= expected
        kept, lost = make_corpus(
            CorpusConfig(source=kind, path=str(tmp_path / kind), processes=1, **more), kind, layout.corpus(kind), tmp_path
        )
        rejects = read_jsonl(layout.corpus(kind)/"rejects.jsonl")
        assert (
            len(rejects) == lost
            and kept + lost == sum(map(len, expected.values()))
            and {r["reason"] for r in rejects} <= set(IMPORT_REASONS)
        )
        for r in rejects:
            found.setdefault(
                (kind, known[kind][r["line"] if "line" in r else stem(r["id"] or r.get("audio_filepath", r["file"]))]), []
            ).append(r["reason"])
        for r in read_jsonl(layout.corpus(kind) / "manifest.jsonl"):
            assert Path(os.path.realpath(layout.corpus(kind) / r["audio_filepath"])).is_relative_to(tmp_path/kind)
            assert r["sha256"] != sha256(tmp_path/"outside.wav")
    stats = prepared(layout, max_reject_share=0.9)
    rejects, rows = read_jsonl(layout.prepared/"rejects.jsonl"), [r for split in SPLITS for r in read_jsonl(layout.manifest(split))]
    assert len(rows) + len(rejects) == stats["utterances"] and Counter(r["reason"] for r in rejects) == {
        k: n for k, n in stats["rejects"].items() if n
    }
    for r in (*rejects, *rows):
        found.setdefault((r["corpus"], known[r["corpus"]][r["id"].removeprefix(r["corpus"] + "-")]), []).append(r.get("reason", "works"))
    assert {k: (v, wanted.get(k)) for k, v in found.items() if sorted(v) != wanted.get(k)} == {} and len(found) == len(wanted)
    for split in SPLITS:
        index = sharded(layout, split, ShardsConfig(shard_size=9, processes=1, max_reject_share=0.))
        assert verify(layout.split_shards(split), index) == []
    loader = create_webdataset_loader(layout.split_shards("train"), 4, 0, index=layout.split_index("train"))
    assert (
        sorted(i for batch in loader for i in batch.ids) == sorted(r["id"] for r in read_jsonl(layout.manifest("train")))
        and loader.report()["skipped"] == []
    )


# Where the corpus should be

def blocked(*_, **__): raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    "source, path, message",
    [
        ("demo", "nowhere", "nowhere: no such folder; path must name the folder that holds sentences.vi.txt"),
        ("demo", "file", "file: no such folder"),
        ("demo", "folder", "folder/sentences.vi.txt: cannot be read (Is a directory)"),
        (
            "common_voice",
            "nowhere",
            "nowhere: no such folder; path must name a language's folder of a Common Voice release, with clips/ and "
            "train.tsv or validated.tsv in it",
        ),
        ("common_voice", "file", "file: no such folder"),
        ("common_voice", "folder", "folder: has no test.tsv, dev.tsv, train.tsv"),
        ("common_voice", "locked", "locked: cannot be read (Permission denied); change its permissions"),
    ],
)
def test_wrong_corpus_path_is_named(tmp_path, monkeypatch, source, path, message):
    (tmp_path/"file").touch()
    for name in ("folder/sentences.vi.txt", "locked"): (tmp_path/name).mkdir(parents=True)
    before = contents(corpus(release(tmp_path/"cv", train=["a"]), tmp_path).corpora)
    if path == "locked": monkeypatch.setattr(os, "listdir", blocked)  # root may read everything
    with pytest.raises(ConfigError) as error:
        make_corpus(CorpusConfig(source=source, path=path, processes=1), "cv", tmp_path / "data/corpus/cv", tmp_path)
    assert str(error.value).startswith("corpora.cv: ") and message in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert contents(tmp_path/"data/corpus") == before and os.listdir(tmp_path/"data/corpus") == ["cv"]


# Killed in the middle

def test_killed_corpus_is_made_again(tmp_path):
    killed(
        "import ai2text.corpora.corpus as c, ai2text.corpora.importers as i\nspeak = i.record\ndef record(*a, **k): die(); return speak(*a, **k)\ni.record = record\n"
        "c.make_corpus(c.CorpusConfig(sentences=6, dev_sentences=1, test_sentences=1, processes=1), 'demo', 'corpus')",
        tmp_path,
    )
    assert os.listdir(tmp_path) == [".corpus.part"] and len(list(tmp_path.glob(".corpus.part/wav/*.wav"))) == 2
    make_corpus(CorpusConfig(sentences=6, dev_sentences=1, test_sentences=1, processes=1), "demo", tmp_path/"corpus")
    assert os.listdir(tmp_path) == ["corpus"]
    assert {Path(r["audio_filepath"]) for r in read_jsonl(tmp_path / "corpus/manifest.jsonl")} == {
        p.relative_to(tmp_path / "corpus") for p in tmp_path.glob("corpus/wav/*")
    }


def test_killed_prepare_leaves_no_complete_manifests(tmp_path):
    layout = corpus(release(tmp_path/"cv", train=["a", "b"], dev=["d"], test=["e"]), tmp_path)
    prepared(layout)
    whole = contents(layout.prepared)
    killed(
        "import ai2text.corpora.prepare as p\nwrite = p.write_jsonl\ndef write_jsonl(*a): die(); write(*a)\np.write_jsonl = write_jsonl\n"
        "p.prepare(p.PrepareConfig(tokenizer='char', processes=1), 'data/corpus', 'data/prepared')",
        tmp_path,
    )
    assert sorted(p.name for p in layout.prepared.glob("*.json*")) == ["normaliser.json", "rejects.jsonl", "train.jsonl"]
    prepared(layout)
    assert contents(layout.prepared) == whole


def test_killed_shards_keep_complete_shards(tmp_path):
    layout = corpus(release(tmp_path/"cv", train=["a", "b", "c", "d"], dev=["e"], test=["f"]), tmp_path)
    prepared(layout)
    killed(
        "import ai2text.data.shards as s\nfrom ai2text.core.layout import Layout; from ai2text.core.files import read_jsonl\nend = s.tar_end\ndef tar_end(size): die(); return end(size)\ns.tar_end = tar_end\n"
        "l = Layout('.')\nconfig = s.ShardsConfig(shard_size=5, codec='wav', processes=1)\n"
        "s.write_shards(read_jsonl(l.manifest('train')), l.split_shards('train'), l.split_index('train'), config, audio_root=l.prepared)",
        tmp_path,
    )
    folder, names = layout.split_shards("train"), ["shard-000000.tar", "shard-000001.tar"]
    assert sorted(p.name for p in folder.glob("*.tar")) == names and not layout.split_index("train").exists()
    with pytest.raises(ConfigError, match="train.json: no such index; run the stage `shards`"): load_index(layout.split_index("train"))
    times = [(folder/n).stat().st_mtime_ns for n in names]
    index = sharded(layout, "train")
    assert len(index) == 16 and verify(folder, index) == [] and len(os.listdir(folder)) == 4
    assert [(folder/n).stat().st_mtime_ns for n in names] == times


def test_full_disk_leaves_no_partial_shard(tmp_path):
    "A limit on the size of files simulates a full disk."
    layout = corpus(release(tmp_path/"cv", train=["a", "b"], dev=["d"], test=["e"]), tmp_path)
    prepared(layout)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(OSError, match=r"data/shards/train/shard-000000.tar"): sharded(layout, "train")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(layout.split_shards("train")) == [] and not layout.split_index("train").exists()
    assert verify(layout.split_shards("train"), sharded(layout, "train")) == []


# A model trained on other data

def test_model_with_another_vocabulary_is_refused(tmp_path):
    from ai2text.models.store import save_model
    from ai2text.core.sections import StreamConfig
    from ai2text.evaluation.evaluate import evaluate
    from ai2text.models.store import build_model
    from ai2text.text.tokenizer import load_tokenizer
    layout = corpus(release(tmp_path/"cv", train=["a", "b"], dev=["d"], test=["e"]), tmp_path)
    prepared(layout)
    model = build_model(dict(family="conformer", size="tiny"), load_tokenizer(layout.tokenizer))
    save_model(layout.model(M), model, None, lambda part: model.tokenizer.save(part/"tokenizer"), "conformer")
    prepared(layout, tokenizer="bpe", vocab_size=model.tokenizer.vocab_size + 2)
    with pytest.raises(
        ConfigError,
        match=rf"models/{M}: was trained with another vocabulary \(char, .* symbols\) than the data's \(bpe, .*\); train it again on this data",
    ):
        evaluate(M, StreamConfig(), layout)
    assert not layout.results(f"{M}-eval").exists()


# On the terminal

@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "A copy of the project, prepared on a tiny corpus of recordings."
    w = Workspace(tmp_path_factory.mktemp("project"))
    release(w.root/"cv", train=["a", "b"], dev=["d"], test=["e"])
    w.change(dict(corpora=dict(demo=None, cv=dict(source="common_voice", path="cv", processes=1)), shards=dict(processes=1, codec="wav")))
    prepared(corpus(w.root/"cv", w.root))
    return w


def fails(w:Workspace, *command:str, code:int)->str:
    "stderr of a command that fails, without a traceback."
    done = subprocess.run(command, cwd=w.root, capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def stage(w:Workspace, *words:str, code:int)->str:
    "The last line of stderr of a stage that fails; its traceback is in the report alone."
    lines = fails(w, sys.executable, "-m", "ai2text.pipeline.cli", "stage", *words, code=code).splitlines()
    assert [line for line in lines if line.strip() and "%|" not in line] == lines[-1:], "\n".join(lines) # without progress bars
    return lines[-1]


@pytest.mark.parametrize(
    "right, wrong, why",
    [
        ("warmup_steps:", "warmup_step:", "params.yaml: train.warmup_step: no such parameter; did you mean warmup_steps?"),
        (
            "hardware: demo",
            "hardware: dmo",
            "train.hardware: 'dmo': params.yaml has no such recipe; choose from demo, small_gpu, large_gpu",
        ),
        (
            ", memory_gb: 12.0",
            "",
            "params.yaml: hardware.small_gpu.memory_gb: missing; add it (memory of a GPU that may be used; micro-batches are "
            "split to fit into it; 0 = all)",
        ),
    ],
)
def test_typo_is_found_before_any_work(workspace, right, wrong, why):
    text = (workspace.root/"params.yaml").read_text()
    assert right in text
    (workspace.root/"params.yaml").write_text(text.replace(right, wrong))
    try: error = stage(workspace, "corpus", "--corpus", "cv", code=2)
    finally: (workspace.root/"params.yaml").write_text(text)
    assert error == f"ai2text stage: {why}"


def test_missing_corpus_is_one_line_on_the_terminal(workspace):
    before = contents(Layout(workspace.root).corpora)
    workspace.change(dict(corpora=dict(cv=dict(path="nowhere"))))
    try:
        error = stage(workspace, "corpus", "--corpus", "cv", code=1)
        assert error.startswith(
            "ai2text stage: stage corpus: ConfigError: corpora.cv: nowhere: no such folder; path must name"
        ) and error.endswith("; its report: papermill_runs/corpus-cv.ipynb")
        assert "no such folder" in nbformat.read(workspace.report("corpus-cv"), 4).cells[0].source
        assert contents(Layout(workspace.root).corpora) == before
        # DVC checks its dependencies before the stage runs
        assert fails(workspace, "dvc", "repro", "-s", "corpus@cv", code=255).splitlines()[-1].endswith("/nowhere'")
    finally: workspace.change(dict(corpora=dict(cv=dict(path="cv"))))


def test_full_disk_and_missing_files_are_one_line_on_the_terminal(workspace):
    layout = Layout(workspace.root)
    limited = ["bash", "-c", f"ulimit -f 200; exec '{sys.executable}' -m ai2text.pipeline.cli stage shards"] # blocks of 1024 bytes
    error = fails(workspace, *limited, code=1).splitlines()[-1]
    assert error.startswith("ai2text stage: stage shards: OSError: [Errno 27] File too large: 'data/shards/train/shard-000000.tar'"), error
    assert not list(workspace.root.glob("data/shards/*/*")) and not list(workspace.root.glob("data/index/*.json"))
    held = layout.manifest("dev").read_bytes()
    layout.manifest("dev").unlink()
    error = stage(workspace, "shards", code=1)
    assert "data/prepared/dev.jsonl'; run the stage that makes it, or `dvc repro` for all; its report" in error
    layout.manifest("dev").write_bytes(held)
    done = workspace.run(sys.executable, "-m", "ai2text.pipeline.cli", "stage", "shards")
    assert done.startswith("train: 1 shards, 8 utterances") and verify(layout.split_shards("dev"), layout.split_index("dev")) == []


# The command line

def command(capsys, *words)->tuple:
    "Exit status and output."
    try: code = main(list(map(str, words)))
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    return code, out + err


@pytest.mark.parametrize(
    "words, message",
    [
        ("stge", "argument COMMAND: invalid choice: 'stge' (choose from"),
        ("stage", "the following arguments are required: name"),
        (
            "stage trian",
            "ai2text stage: trian: no such stage; known are corpus, pseudo, prepare, shards, init, train, evaluate, compare, export, plan",
        ),
        ("stage train", f"ai2text stage: stage train: runs once a model; add --model and one of {M}"),
        ("stage train --model conformer", f"--model conformer: params.yaml has no models.conformer; known are {M}"),
        ("stage corpus --model conformer_ctc", "this stage is the same for all models; leave --model out"),
        ("train --max-steps many", "argument --max-steps: invalid int value: 'many'"),
        ("train --amp-dtype fp9", "ai2text train: train.amp_dtype: 'fp9' is not known; choose from 'auto'"),
        ("train --model other", f"ai2text train: params.yaml: models: no other; there are {M}"),
        ("train", "data/prepared/tokenizer/tokenizer.json: no such file; run the prepare stage to make the tokenizer"),
        ("train --dry-run", "data/prepared/tokenizer/tokenizer.json: no such file; run the prepare stage to make the tokenizer"),
        (
            "train --dry-run --hardware big",
            "ai2text train: train.hardware: 'big': params.yaml has no such recipe; choose from demo, small_gpu, large_gpu",
        ),
        ("ttq missing", "error: missing: no such file; give a ttq_log.json or its folder"),
        ("summary", "results: no results yet; run `make demo`"),
        ("verify nowhere", "ai2text verify: nowhere/index.json: no such index; run the stage `shards`"),
        ("runs --keep -1", "ai2text runs: --keep -1: give 0 or more"),
        ("shards --audio-dir nowhere --transcript-file t.json --output-dir out", "ai2text shards: nowhere: no such folder of recordings"),
        ("shards --audio-dir . --transcript-file t.json --output-dir out", "ai2text shards: [Errno 2] No such file or directory: 't.json'"),
        ("shards --audio-dir . --transcript-file . --output-dir out", "ai2text shards: [Errno 21] Is a directory: '.'"),
    ],
)
def test_wrong_command_lines_are_one_line_errors(tmp_path, monkeypatch, capsys, words, message):
    for name in ("params.yaml", "dvc.yaml", "nbs"): (tmp_path/name).symlink_to(ROOT/name)
    monkeypatch.chdir(tmp_path)
    code, text = command(capsys, *words.split())
    assert code == 2 and message in text and "Traceback" not in text
    assert sorted(os.listdir(tmp_path)) == ["dvc.yaml", "nbs", "params.yaml"]


def test_commands_outside_of_a_project_name_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in ("runs", "summary", "stage corpus", "train"):
        code, text = command(capsys, *words.split())
        assert code == 2 and text.endswith(
            f"{tmp_path}: neither this folder nor one above it has dvc.yaml and params.yaml; change to the project's folder\n"
        )
    for name in ("params.yaml", "dvc.yaml"): (tmp_path/name).symlink_to(ROOT/name)
    assert command(capsys, "runs") == (0, f"0 runs in {tmp_path/'.runs'}\n")


def test_shards_command_rejects_bad_transcripts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    release(Path("cv"), train=["a"])
    shutil.copy("cv/clips/1.wav", "outside.wav")
    def shards(transcripts, share="0.9"):
        Path("t.json").write_text(json.dumps(transcripts))
        return command(
            capsys, "shards", "--audio-dir", "cv/clips", "--transcript-file", "t.json", "--output-dir", "out",
            "--max-reject-share", share, "--processes", "1"
        )

    code, text = shards([dict(id="1", text="một")])
    assert (code, text) == (2, 'ai2text shards: t.json: holds a list; write one JSON object, {"id": "transcript", ...}\n')
    code, text = shards({"../../etc/passwd": "một"})
    assert code == 2 and text.endswith("an empty split cannot be sharded (1 x has no audio file (as '../../etc/passwd'))\n")
    assert not Path("out").exists()
    code, text = shards({"1": "một", "../../etc/passwd": "hai", "../../outside": "ba", "2": "..."})
    assert code == 0 and "1 shards, 1 utterances" in text and "3 rejected: 1 x " in text
    rejected = {r["id"]: r["reason"] for r in read_json("out/index.json")["rejected"]}
    assert rejected == {
        "../../etc/passwd": "has no audio file",
        "../../outside": "leads out of the audio folder",
        "2": "has an empty transcript",
    }
    code, text = shards({"1": "một", "../../outside": "ba"}, "0.1")
    assert (
        code == 2
        and "1 of 2 recordings rejected, more than max_reject_share = 0.1 allows: 1 x leads out of the audio folder (as '../../outside')"
        in text
    )


# make demo, interrupted before the pipeline

PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p $4/bin && cp "$0" $4/bin/python && for p in dvc ai2text; do printf '#!/bin/sh\\necho %s $@ >> calls\\n' $p > $4/bin/$p; chmod +x $4/bin/$p; done; echo venv >> calls ;;
"-m pip") echo pip >> calls; test ! -e broken ;;
esac
"""


def test_interrupted_install_starts_again(tmp_path):
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"): shutil.copy(ROOT/name, tmp_path)
    (tmp_path/"python").write_text(PYTHON)
    (tmp_path/"python").chmod(0o755)
    def demo():
        (tmp_path/"calls").write_text("")
        done = subprocess.run(
            ["make", "demo", f"PYTHON={tmp_path / 'python'}", "VENV=environment"], cwd=tmp_path,
            env=environment(MAKEFLAGS=None), capture_output=True, text=True
        )
        return done.returncode, (tmp_path/"calls").read_text().split("\n")[:-1]
    (tmp_path/"broken").touch()
    assert demo() == (2, ["venv", "pip"])
    (tmp_path/"broken").unlink()
    assert demo() == (0, ["venv", "pip", "dvc repro", "ai2text summary"])
    assert demo() == (0, ["dvc repro", "ai2text summary"])

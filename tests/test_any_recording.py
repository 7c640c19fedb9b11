"Every kind of recording and every wrong header has one length, one text and one verdict in corpus, prepare, shards, transcribe and stream."
import io
import json
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import soundfile as sf

from ai2text.audio.decoders import AUDIO_SUFFIXES, NOTES
from ai2text.audio.io import AudioError, read_audio
from ai2text.core.files import read_jsonl
from ai2text.core.sections import CorpusConfig, PrepareConfig, ShardsConfig
from ai2text.corpora.corpus import make_corpus
from ai2text.corpora.prepare import prepare
from ai2text.data.shard_index import member_audio, members
from ai2text.data.shards import write_shards
from ai2text.pipeline.cli import main
from ai2text.serving.client import stream, transcribe
from ai2text.serving.recogniser import load_recogniser
from ai2text.serving.latency import served
from ai2text.testing.recordings import RECORDINGS, of_kind
from ai2text.testing.toy_bundle import WORDS, toy_bundle, whistle

RATE = 16_000
SPOKEN = [" ".join(words) for words in permutations(list(WORDS)[:5])]  # the sixth word is outside the band of a telephone


def wav(wave, rate=RATE, **how):
    sf.write(buffer := io.BytesIO(), wave, rate, format=how.pop("format", "WAV"), **how)
    return buffer.getvalue()


def sized(data, size, at=40): return data[:at] + size.to_bytes(4, "little") + data[at + 4:]


# name: makes the bytes of the file from a wave; keys of its NOTES; the reason for which it is refused
FAULTS = {
    "killed.wav": (lambda wave: sized(sized(wav(wave), 0), 0, 4), ["zero"], ""),
    "killed24.wav": (lambda wave: sized(wav(wave, subtype="PCM_24"), 0), ["zero"], ""),
    "half.wav": (lambda wave: sized(wav(wave), len(wave)), ["short"], ""),
    "half.aiff": (
        lambda wave: (lambda data: data[: (at := data.index(b"SSND") + 4)] + len(wave).to_bytes(4, "big") + data[at + 4 :])(
            wav(wave, format="AIFF")
        ),
        ["short"],
        "",
    ),
    "pipe.wav": (lambda wave: sized(sized(wav(wave), 0xFFFFFFFF), 0xFFFFFFFF, 4), [], ""),
    "twice.mp3": (lambda wave: wav(wave[: len(wave) // 2], format="MP3") + wav(wave[len(wave) // 2 :], format="MP3"), ["joined"], ""),
    "twice.ogg": (lambda wave: wav(wave[: len(wave) // 2], format="OGG") + wav(wave[len(wave) // 2 :], format="OGG"), ["joined"], ""),
    "inverted.wav": (lambda wave: wav(np.stack([wave, -wave], 1)), ["cancel"], ""),
    "inverted.mp3": (lambda wave: wav(np.stack([wave, -wave], 1), format="MP3"), ["cancel"], ""),
    "renamed.wav": (lambda wave: of_kind("iphone.m4a", wave), [], ""),
    "broken.wav": (lambda wave: wav(wave)[:-30_000], [], "truncated"),
    "broken.flac": (lambda wave: wav(wave, format="FLAC")[:-9_000], [], "truncated"),
    "broken.m4a": (lambda wave: of_kind("memo.m4a", wave)[:-9_000], [], "unreadable audio"),
    "text.m4a": (lambda wave: b"<html>not found</html>", [], "unreadable audio"),
    "pointer.wav": (lambda wave: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", [], "unreadable audio"),
    "list.aac": (lambda wave: b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/a.aac\n#EXT-X-ENDLIST\n", [], "unreadable audio"),
}
CASES = {name: (lambda wave, name=name: of_kind(name, wave), [], "") for name in RECORDINGS} | FAULTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A corpus of all of them, each of another speaker, with its text beside it."
    home = tmp_path_factory.mktemp("any")
    for number, (name, (make, _, _)) in enumerate(CASES.items()):
        (home/f"raw/s{number}").mkdir(parents=True)
        (home/f"raw/s{number}"/name).write_bytes(make(whistle(SPOKEN[number])[0]))
        (home/f"raw/s{number}"/name).with_suffix(".txt").write_text(SPOKEN[number], "utf-8")
    return home


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return toy_bundle(tmp_path_factory.mktemp("toy")/"bundle")


def paths(folder): return {path.name: path for path in sorted((folder/"raw").rglob("*.*")) if path.suffix != ".txt"}


def is_correct(seconds, text, number):
    return abs(seconds - len(whistle(SPOKEN[number])[0])/RATE) < 0.08 and text.split() == SPOKEN[number].split()


def test_corpus_prepare_and_shards_agree_on_every_recording(folder, bundle):
    config = CorpusConfig(source="folder", path=str(folder/"raw"), processes=1)
    make_corpus(config, "any", folder/"corpora/any")
    unreadable = {row["file"].split("/")[-1]: row["reason"] for row in read_jsonl(folder/"corpora/any/rejects.jsonl")}
    stats = prepare(PrepareConfig(max_reject_share=0.5, tokenizer="char", processes=1), folder/"corpora", folder/"prepared")
    rejects = {row["audio_filepath"].split("/")[-1]: row["reason"] for row in read_jsonl(folder/"prepared/rejects.jsonl")} | unreadable
    assert rejects == {name: reason for name, (_, _, reason) in CASES.items() if reason}
    noted = {note["note"]: note["utterances"] for note in stats["notes"]}
    assert noted == Counter(NOTES[key] for _, keys, _ in CASES.values() for key in keys)
    recogniser, found = load_recogniser(bundle), {}
    for split in ("train", "dev", "test"):
        rows = read_jsonl(folder/f"prepared/{split}.jsonl")
        index = write_shards(
            rows, folder / "shards" / split, folder / f"{split}.json", ShardsConfig(codec="wav", processes=1),
            audio_root=folder / "prepared"
        )
        assert not index.rejected
        block = (folder/"shards"/split/index.shards[0]["file"]).read_bytes()
        for at, size, seconds in zip(index.offset, index.size, index.duration):
            held = members(block[at:at + size])
            about = json.loads(bytes(held["json"]))
            assert not {"notes", "offset", "channel"} & set(about)
            found[about["text"]] = seconds, recogniser(read_audio(bytes(member_audio(held))))[0]
        for row in rows:
            name = row["audio_filepath"].split("/")[-1]
            assert row.get("notes", []) == [NOTES[key] for key in CASES[name][1]]
            assert row["duration"] == pytest.approx(found[row["text"]][0], abs=1e-3)
    for number, (name, (_, _, reason)) in enumerate(CASES.items()):
        assert reason and SPOKEN[number] not in found or is_correct(*found[SPOKEN[number]], number), (name, found.get(SPOKEN[number]))


def test_transcribe_reads_every_recording(folder, bundle, capsys, tmp_path):
    files = paths(folder)
    assert transcribe(bundle, list(files.values()), format="json", processes=1) == 1
    captured = capsys.readouterr()
    found = {json.loads(line)["file"].split("/")[-1]: json.loads(line) for line in captured.out.splitlines()}
    for number, (name, (_, keys, reason)) in enumerate(CASES.items()):
        if reason: assert name not in found and f"{name}: " in captured.err; continue
        assert is_correct(found[name]["duration"], found[name]["text"], number), (name, found[name]["duration"], found[name]["text"])
        for key in keys: assert f"{name}: {NOTES[key]}" in captured.err
    assert f"{sum(bool(reason) for *_, reason in CASES.values())} of {len(CASES)} files could not" in captured.err


def test_stream_reads_every_recording(folder, bundle, capsys):
    files = paths(folder)
    with served(bundle) as service: assert stream(service.websocket, [str(files[name]) for name in CASES], fast=True) == 1
    captured = capsys.readouterr()
    found = {(row := line.rsplit(":", 1))[0].split("/")[-1]: row[1] for line in captured.out.splitlines()}
    for number, (name, (_, keys, reason)) in enumerate(CASES.items()):
        if reason: assert name not in found and f"{name}: " in captured.err; continue
        assert found[name].split() == SPOKEN[number].split(), (name, found[name])
        for key in keys: assert f"{name}: {NOTES[key]}" in captured.err


def test_each_channel_of_a_call_has_its_transcript(folder, bundle, tmp_path, capsys):
    one, two = (whistle(text)[0] for text in SPOKEN[:2])
    for name, data in {
        "call.wav": wav(np.stack([one, two], 1)),
        "memo.wav": wav(one),
        "call.m4a": of_kind("iphone.m4a", np.stack([one, two], 1)),
    }.items():
        (tmp_path / name).write_bytes(data)
    files = [tmp_path/"call.wav", tmp_path/"memo.wav"]
    assert transcribe(bundle, files, channel="each", to=tmp_path/"out", processes=1) == 0
    texts = {path.name: path.read_text("utf-8").strip() for path in (tmp_path/"out").iterdir()}
    assert (
        texts == {"call-left.txt": SPOKEN[0], "call-right.txt": SPOKEN[1], "memo.txt": SPOKEN[0]}
        and "3 of 3 transcripts" in capsys.readouterr().out
    )
    for channel, text in (("left", SPOKEN[0]), ("right", SPOKEN[1])):
        assert transcribe(bundle, [tmp_path/"call.m4a"], channel=channel, processes=1) == 0
        assert capsys.readouterr().out.strip() == text
    assert transcribe(bundle, files, channel="right", processes=1) == 1  # a memo has no right channel
    captured = capsys.readouterr()
    assert SPOKEN[1] in captured.out and "memo.wav: channel right: the recording has 1" in captured.err
    assert transcribe(bundle, [tmp_path/"call.wav"], channel="each", format="json", processes=1) == 0
    assert [json.loads(line)["channel"] for line in capsys.readouterr().out.splitlines()] == ["left", "right"]


def test_bad_files_do_not_stop_the_others(bundle, tmp_path, capsys):
    (tmp_path/"a.wav").write_bytes(wav(whistle(SPOKEN[0])[0]))
    (tmp_path/"b.raw").write_bytes(b"\1\2"*8000)
    (tmp_path/"c.m4a").mkdir()
    (tmp_path/"d.wav").write_bytes(b"")
    (tmp_path/"e.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    names = ["b.raw", "c.m4a", "d.wav", "none.mp4", "e.wav", "a.wav", "b.pcm"]
    (tmp_path/"b.pcm").write_bytes(b"\1\2"*8000)
    assert main(["transcribe", str(bundle), *(str(tmp_path/name) for name in names), "--processes", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.out.strip() == f"{tmp_path}/a.wav:{SPOKEN[0]}"
    assert "Traceback" not in captured.err and "System error" not in captured.err
    text = "it is text, 'version https://git-lfs.github.com/spec/v1'); fetch the file itself, with `git lfs pull`"
    causes = "raw samples without a sample rate; write them as WAV", "it is no file", "the file is empty", "no such file", text
    for name, why in zip(names, causes): assert f"{name}: " in captured.err and why in captured.err


def test_corrupt_headers_take_neither_memory_nor_time(tmp_path):
    data = wav(np.zeros(1000, np.float32))
    for at, size, value in ((24, 4, 10**9), (22, 2, 1000), (22, 2, 0), (24, 4, 0), (16, 4, 2**31), (34, 2, 65535)):
        with pytest.raises(AudioError): read_audio(data[:at] + value.to_bytes(size, "little") + data[at + size:])
    rng = np.random.default_rng(0)
    for name in [*RECORDINGS, "flac", "ogg"]:  # wrong bytes anywhere give samples or AudioError
        whole = bytearray(
            of_kind(name, np.zeros(8000, np.float32)) if name in RECORDINGS else wav(np.zeros(8000, np.float32), format=name.upper())
        )
        for _ in range(8):
            data = whole.copy()
            for at in rng.integers(0, min(len(data), 600), 6): data[at] = rng.integers(256)
            try: assert len(read_audio(bytes(data))) < 40*RATE
            except AudioError as e: assert str(e) and "\n" not in str(e)


def test_a_missing_recording_is_rejected_as_not_found(tmp_path):
    (tmp_path/"metadata.csv").write_text("id|audio|text\n1|sound\\a.m4a|một hai\n2|gone.m4a|ba bốn\n", "utf-8")
    (tmp_path/"sound").mkdir()
    (tmp_path/"sound/a.m4a").write_bytes(of_kind("iphone.m4a", whistle(SPOKEN[0])[0]))
    make_corpus(CorpusConfig(source="csv", path=str(tmp_path), processes=1), "c", tmp_path/"c")
    assert [row["id"] for row in read_jsonl(tmp_path/"c/manifest.jsonl")] == ["c-1"]  # with the backslash of Windows
    (reject,) = read_jsonl(tmp_path/"c/rejects.jsonl")
    assert (reject["reason"], reject["detail"]) == ("audio not found", "gone.m4a")


def test_segments_and_channels_of_a_manifest_are_written_alone(tmp_path):
    "Rows with offset, duration and channel are probed, hashed and written as this segment."
    waves = [[whistle(text)[0] for text in SPOKEN[at:at + 12]] for at in (0, 40)]
    channels = [np.concatenate(part) for part in waves]
    length = min(map(len, channels))
    (tmp_path/"corpora/c").mkdir(parents=True)
    (tmp_path/"corpora/c/long.m4a").write_bytes(of_kind("memo.m4a", np.stack([channel[:length] for channel in channels], 1)))
    rows = []
    for channel, part, at in zip(("left", "right"), waves, (0, 40)):
        for number, wave in enumerate(part):
            rows.append(dict(id=f"{channel}{number}", audio_filepath="long.m4a", text_raw=SPOKEN[at + number], speaker=f"{channel}{number}",
                             channel=channel, offset=number*len(wave)/RATE, duration=len(wave)/RATE))
    (tmp_path/"corpora/c/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    prepare(PrepareConfig(tokenizer="char", processes=1, dev_share=0.1, test_share=0.1), tmp_path/"corpora", tmp_path/"prepared")
    kept = read_jsonl(tmp_path/"prepared/train.jsonl")
    assert len(kept) == 20 and {row["channels"] for row in kept} == {1}
    index = write_shards(
        kept, tmp_path / "shards", tmp_path / "index.json", ShardsConfig(codec="wav", processes=1), audio_root=tmp_path / "prepared"
    )
    assert not index.rejected
    block, waves = (tmp_path/"shards"/index.shards[0]["file"]).read_bytes(), {row["id"]: whistle(row["text_raw"])[0] for row in rows}
    for at, size in zip(index.offset, index.size):
        held = members(block[at:at + size])
        wave = waves[json.loads(bytes(held["json"]))["id"].removeprefix("c-")]
        found = read_audio(bytes(member_audio(held)))
        assert len(found) == len(wave) and np.abs(found - wave).max() < 2e-4


def test_suffixes_are_lower_case_and_known_to_folders():
    assert len(set(AUDIO_SUFFIXES)) == len(AUDIO_SUFFIXES) and {name[name.rindex("."):] for name in RECORDINGS} <= set(AUDIO_SUFFIXES)

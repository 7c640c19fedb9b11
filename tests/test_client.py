"Files through worker processes, and streams to a service in a process of its own."
import io
import json
import re
import tracemalloc

import numpy as np
import pytest
import soundfile as sf

from ai2text.audio.io import resample
from ai2text.serving.client import recognise, stream, transcribe
from ai2text.serving.recogniser import load_recogniser
from ai2text.serving.latency import EDGE, Session, figures, load, served
from ai2text.audio.segment import LONGEST
from ai2text.protocols.streaming import Refused, run
from ai2text.testing.toy_bundle import WORDS, toy_bundle, whistle

RATE, TOKEN = 16_000, "0123456789abcdef"


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_bundle(tmp_path_factory.mktemp("toy")/"bundle")


@pytest.fixture(scope="module")
def service(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("token")/"token"
    path.write_text(TOKEN + "\n")
    with served(toy, token_file=str(path)) as running: yield running


def talk(turns, seed=0):
    "Turns of six tones with pauses between them: the samples and each word's times."
    rng, waves, spans, at = np.random.default_rng(seed), [], [], 0
    for _ in range(turns):
        wave, found = whistle(" ".join(rng.choice(list(WORDS), 6)), pause=0.12)
        wave = np.concatenate([wave, np.zeros(round(rng.uniform(0.25, 0.8)*RATE), np.float32)])
        spans += [[w, a + at/RATE, b + at/RATE] for w, a, b in found]
        waves.append(wave)
        at += len(wave)
    return np.concatenate(waves), spans


def same(words, spans, within=0.08):
    assert [w.word for w in words] == [w for w, *_ in spans]
    assert max(max(abs(w.start - a), abs(w.end - b)) for w, (_, a, b) in zip(words, spans)) < within


# Files

@pytest.mark.parametrize("name, rate", [("a.wav", 8_000 * 2), ("a.flac", 44_100), ("a.mp3", 48_000), ("a.ogg", 22_050), ("a.wav", 11_025)])
def test_words_and_times_at_any_rate_and_format(toy, tmp_path, name, rate):
    wave, spans = talk(12)
    wave = resample(wave, RATE, rate)
    sf.write(tmp_path/name, np.stack([wave, wave], 1), rate)
    (found, error), = recognise(load_recogniser(toy), [tmp_path/name], processes=1)
    assert not error and len(found.lines) > found.duration/LONGEST
    if rate < 16_000: spans = [s for s in spans if WORDS[s[0]] < rate/2 - 500]  # the others are above the Nyquist frequency
    # frames of 0.04 s; a codec smears
    same([w for w in found.words if WORDS[w.word] < rate/2 - 500], spans, 0.1 if name in ("a.mp3", "a.ogg") else 0.08)


def test_bad_files_are_reported_and_the_others_transcribed(toy, tmp_path, capsys):
    wave, spans = talk(8)
    for name in ("good.wav", "cut.flac", "short.mp3", "last.ogg"): sf.write(tmp_path/name, wave, RATE)
    for name in ("cut.flac", "short.mp3"): (tmp_path/name).write_bytes((tmp_path/name).read_bytes()[:-4000])
    (tmp_path/"no.wav").write_bytes(b"RIFF")
    files = [tmp_path/n for n in ("cut.flac", "good.wav", "short.mp3", "no.wav", "missing.wav", "last.ogg")]
    assert transcribe(toy, files, format="json", to=tmp_path/"out", processes=2) == 1
    printed = capsys.readouterr()
    assert "2 of 6 files transcribed" in printed.out and "4 of 6 files could not be transcribed" in printed.err
    for name in ("cut.flac", "short.mp3: breaks off", "no.wav", "missing.wav"): assert name in printed.err
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == ["good.json", "last.json"]
    assert json.loads((tmp_path/"out/good.json").read_text("utf-8"))["text"].split() == [w for w, *_ in spans]


def test_subtitles_are_well_formed(toy, tmp_path, capsys):
    wave, spans = talk(10)
    sf.write(tmp_path/"a.wav", wave, RATE)
    out = {}
    for format in ("srt", "vtt"):
        assert transcribe(toy, [tmp_path/"a.wav"], format=format, processes=1) == 0
        out[format] = capsys.readouterr().out
    blocks = [b.split("\n") for b in out["srt"].strip().split("\n\n")]
    assert [int(b[0]) for b in blocks] == list(range(1, len(blocks) + 1))
    clock = r"(\d\d):([0-5]\d):([0-5]\d)[,.](\d{3})"
    times = [[float(h)*3600 + float(m)*60 + float(s) + float(ms)/1000 for h, m, s, ms in re.findall(clock, b[1])] for b in blocks]
    assert all(re.fullmatch(f"{clock} --> {clock}".replace("[,.]", ","), b[1]) and len(b) == 3 and len(b[2]) <= 42 for b in blocks)
    assert all(a < b for a, b in times) and all(a[1] <= b[0] for a, b in zip(times, times[1:]))
    assert " ".join(b[2] for b in blocks).split() == [w for w, *_ in spans]
    assert out["vtt"].startswith("WEBVTT\n\n") and out["vtt"].count(" --> ") == len(blocks) and "," not in out["vtt"]


def test_memory_does_not_grow_with_the_file(toy, tmp_path):
    wave, _ = talk(10)
    sf.write(tmp_path/"long.wav", np.tile(wave, 8), RATE)
    recogniser = load_recogniser(toy)
    tracemalloc.start()
    (found, error), = recognise(recogniser, [tmp_path/"long.wav"], processes=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not error and len(found.words) >= 8*60
    assert peak < 10e6 < found.duration*RATE*4*0.75, peak  # a few segments of 20 s, not the samples of the file


# Streams

def streamed(service, file, capsys, monkeypatch, token=TOKEN, given=b""):
    "The final text and the printed partial ones."
    monkeypatch.setenv("AI2TEXT_TOKEN", token)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(given))))
    text = stream(service.websocket, [str(file)], fast=True)
    return text, capsys.readouterr().err.splitlines()


def test_stream_of_standard_input_and_of_a_file(service, tmp_path, capsys, monkeypatch):
    wave, spans = talk(2)
    sf.write(tmp_path/"a.flac", wave, RATE)
    wanted = " ".join(w for w, *_ in spans)
    for file, given in (("-", (wave*32767).astype("<i2").tobytes()), (tmp_path/"a.flac", b"")):
        text, partials = streamed(service, file, capsys, monkeypatch, given=given)
        assert text == wanted and partials[-1] == wanted and len(partials) > 5 and all(wanted.startswith(p) for p in partials)


def test_stream_without_a_token_or_with_half_a_sample_is_an_error(service, capsys, monkeypatch):
    with pytest.raises(Refused, match="401.*AI2TEXT_TOKEN"): streamed(service, "-", capsys, monkeypatch, token="", given=bytes(3200))
    with pytest.raises(ValueError, match="middle of a sample"): streamed(service, "-", capsys, monkeypatch, given=bytes(3201))
    assert issubclass(Refused, OSError)  # the command line shows it in one line


def test_latency_figures_of_a_real_service(service, tmp_path):
    wave, spans = talk(1)
    what = [Session(f"s{i}", wave, " ".join(w for w, *_ in spans), spans) for i in range(4)]
    before = service.processor()
    logs = run(load(service.websocket, what, streams=4, token=TOKEN))
    f = figures(logs, service.processor() - before)
    assert not f["errors"] and [h.text for h in logs] == [what[0].text]*4
    chunks = int((logs[0].duration - EDGE)/0.32)
    assert f["service"]["n"] >= 4*(chunks - 1) and f["word"]["n"] == 4*len(spans) and f["flicker"] == 0
    for h in logs:
        needs = [n for _, n, _ in h.results]
        assert needs == sorted(needs) and needs[-1] >= h.duration - 0.01  # nothing was dropped
        assert np.all(np.diff([when for _, when in h.sent]) > 0) and h.final > h.done >= h.duration
    # a tone of 0.24 s is recognised before it ends
    assert f["service"]["p50"] > 0 and f["word"]["p50"] > -0.24 and 0 < f["real_time_factor"] < 10


def test_refused_streams_are_counted_as_errors(service):
    logs = run(load(service.websocket, [Session("a", np.zeros(1600, np.float32))], token="wrong"))
    f = figures(logs)
    assert len(f["errors"]) == 1 and "401" in f["errors"][0] and f["final"]["n"] == 0

"Export: graphs, the commands of the model card, the runtime, and what is refused."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import soundfile
import torch

from ai2text.serving import export as exporting
from ai2text.audio.io import read_audio
from ai2text.core.batch import collate
from ai2text.serving.bundle import INPUTS, BundleError, check_bundle, seal
from ai2text.models.store import load_model, save_model
from ai2text.core.files import read_json, read_jsonl, write_json
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.decoding.calibration import calibrated_words
from ai2text.models.conformer import Conformer
from ai2text.models.whisper_ctc import WhisperCTC
from ai2text.serving.bundle import session
from ai2text.core.sections import ExportConfig, StreamConfig
from ai2text.serving.export import ExportError, export, recommended, run_stream, transcribe_pieces, with_silence
from ai2text.serving.client import transcribe
from ai2text.serving.recogniser import load_recogniser
from ai2text.text.tokenizer import load_tokenizer
from ai2text.testing.small_whisper import small_whisper
from ai2text.testing.toy_bundle import toy_whisper
from ai2text.testing.workspace import tiny_workspace

CHUNK, LEFT = 4, 2


@pytest.fixture(scope="module")
def layout():
    "A workspace with published random models that emit tokens."
    layout = Layout(tiny_workspace("shards"))
    tokenizer = load_tokenizer(layout.tokenizer)
    torch.manual_seed(1)
    for name, prob in (("m", 0.5), ("whole", 0.)):
        model = Conformer.from_config(dict(size="tiny", layers=1, dynamic_chunk_prob=prob), tokenizer)
        for p in model.parameters():
            if p.ndim > 1: torch.nn.init.normal_(p, std=2/p[0].numel()**0.5)
        waves = [read_audio(layout.prepared/row["audio_filepath"]) for row in read_jsonl(layout.manifest("test"))]
        model.fit_cmvn([collate(waves, [""]*len(waves), list(map(str, range(len(waves)))))])
        save_model(layout.model(name), model, beside=lambda part: tokenizer.save(part/"tokenizer"), family="conformer")
    return layout


CONFIG, STREAM = (
    dict(model="m", min_utterances=6, runtime_utterances=3, max_wer_gap=1.0, max_int8_gap=1.0),
    StreamConfig(chunk=CHUNK, left_chunks=LEFT),
)


@pytest.fixture(scope="module")
def made(layout):
    "Its bundle and the rows of its hypotheses."
    rows = export(ExportConfig(**CONFIG), STREAM, layout, synthetic=["demo"])
    return SimpleNamespace(
        bundle=check_bundle(layout.bundle), rows=rows, report=read_json(layout.comparison / "export.json"),
        model=exporting.load_model(layout.model("m"))
    )


@pytest.fixture
def copy(made, tmp_path):
    "A copy to corrupt."
    return Path(shutil.copytree(made.bundle.folder, tmp_path/"bundle"))


def speech(layout, row=0): return read_audio(layout.prepared/read_jsonl(layout.manifest("test"))[row]["audio_filepath"])


def test_graphs_have_the_contract_of_the_runtime(made):
    graph = onnx.load(made.bundle.model()).graph
    assert [o.name for o in graph.input] == list(INPUTS)
    assert not any(o.doc_string or o.metadata_props for o in (*graph.node, *graph.initializer, graph)), "names where it was made"
    for name in ("model.onnx", "model.int8.onnx", "model.offline.onnx"):
        assert str(Path.cwd()).encode() not in (made.bundle.folder / name).read_bytes()
    assert {o.key: o.value for o in onnx.load(made.bundle.model(int8=True)).metadata_props}["right_context"] == "6"
    assert made.bundle.model(int8=True).stat().st_size < made.bundle.model().stat().st_size
    assert made.bundle.symbols == made.model.tokenizer.symbols
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=made.bundle.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_report_and_config_have_the_measured_figures(made, layout):
    report, config = made.report, made.bundle.config
    assert report["utterances"] == 6 == len(made.rows) and report["runtime"] == dict(utterances=3, differ={"20": 0, "100": 0, "333": 0})
    assert 0 < max(o["apart"] for o in report["graphs"].values()) < 1e-3 and not any(o["texts_differ"] for o in report["graphs"].values())
    assert sum(len(o["hypothesis"]) for o in made.rows) > 20, "empty texts agree trivially"
    assert (
        next(r["wer"] for r in report["curve"] if (r["chunk"], r["left_chunks"]) == (CHUNK, LEFT)) == report["wer"]["stream"]["wer"]
        and config["wer"] == report["wer"]
    )
    assert config["speech"]["synthetic"] == ["demo"] and set(config["revisions"]) == {
        "weights", "train", "dev", "test", "tokenizer", "code", "commit"
    }


def test_graph_equals_the_model_chunk_by_chunk(made, layout):
    "Independent of the gate: compared with the caches of `Streaming`."
    padded = with_silence(collate([speech(layout)], [""], ["u"]), CHUNK)
    features, frames = made.model.features(padded.audio, padded.lengths)
    wanted, n = exporting.Streaming(made.model, CHUNK, LEFT).stream(features, frames)
    found = run_stream(session(made.bundle.model()), features[0].numpy())
    assert len(found) == n and np.abs(found - wanted[0].numpy()).max() < 1e-3


def blocks(folder, language): return re.findall(rf"```{language}\n(.*?)```", (folder/"README.md").read_text("utf-8"), re.S)


def test_commands_of_the_card_run(made, layout, copy):
    wave = speech(layout)
    soundfile.write(copy/"speech.wav", wave, 16_000)
    batch = collate([wave], [""], ["u"])
    whole = made.model.transcribe(batch)[0]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(PYTHONIOENCODING="utf-8")
    code, = blocks(copy, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and " ".join(done.stdout.split()) == whole.text, done.stderr
    command = blocks(copy, "bash")[0].splitlines()[0].split()
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program if program.exists() else command[0], *command[1:]], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(o for o in done.stderr.splitlines() if o.startswith("{")))
    # it appends silence, in which this random model emits tokens: no text to compare
    assert len(result["tokens"]) > 5 and result["text"] == "".join(result["tokens"]).strip()


@pytest.mark.parametrize("piece_ms", [20, 100, 333])
def test_runtime_gives_the_tokens_and_times_of_the_model(made, layout, piece_ms):
    import sherpa_onnx
    b = made.bundle
    runtime = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        tokens=str(b.tokens), model=str(b.model()), chunk_size=b.chunk_size, num_left_chunks=b.num_left_chunks, num_threads=1
    )
    for row in range(2):
        wave = speech(layout, row)
        h = made.model.transcribe(with_silence(collate([wave], [""], ["u"]), CHUNK), chunk=CHUNK, left_chunks=LEFT)[0]
        tokens, times = transcribe_pieces(runtime, np.pad(wave, (0, b.window)), piece_ms*16)
        n = len(h.tokens) # silence beyond the window may add a chunk, in which this random model emits tokens
        assert n > 5 and tokens[:n] == [b.symbols[i].replace("▁", " ", 1) for i in h.tokens] and np.allclose(times[:n], h.times, atol=1e-3)


def test_first_chunk_is_decoded_after_window_samples(made):
    import sherpa_onnx
    b = made.bundle
    runtime = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(tokens=str(b.tokens), model=str(b.model()), chunk_size=b.chunk_size, num_left_chunks=b.num_left_chunks, num_threads=1)
    stream = runtime.create_stream()
    stream.accept_waveform(16_000, np.zeros(b.window - 1, np.float32))
    assert not runtime.is_ready(stream)
    stream.accept_waveform(16_000, np.zeros(1, np.float32))
    assert runtime.is_ready(stream)


# What is refused

def corrupt(folder, name, change):
    path = folder/name
    path.write_bytes(change(path.read_bytes()))


def resealed(folder, name, change):
    corrupt(folder, name, change)
    seal(folder)


def with_settings(**values): return lambda data: json.dumps(json.loads(data) | values).encode()


@pytest.mark.parametrize(
    "how, name, change, text",
    [
        (corrupt, "model.onnx", lambda d: d[:-1] + bytes([d[-1] ^ 1]), "model.onnx: its content does not match SHA256SUMS"),
        (resealed, "model.int8.onnx", lambda d: d[:1000], "model.int8.onnx: not readable as ONNX"),
        (
            resealed, "config.json", with_settings(chunk_size=8),
            "model.onnx: input x, type and sizes: (1, (1, 19, 80)) instead of (1, (1, 35, 80))"
        ),
        (resealed, "config.json", with_settings(num_left_chunks=4), "model.onnx: input attn_cache"),
        (resealed, "config.json", with_settings(format=99), "config.json: format 99, this code reads 1"),
        (resealed, "config.json", lambda d: b"{", "config.json: cannot be read as JSON"),
        (resealed, "tokens.txt", lambda d: d[: d.rstrip().rindex(b"\n") + 1], "symbols for a model with"),
        (resealed, "tokens.txt", lambda d: d + "ngoài 999\n".encode(), "is not a symbol, a space and"),
    ],
)
def test_corrupt_bundle_is_refused(copy, how, name, change, text):
    how(copy, name, change)
    with pytest.raises(ConfigError, match=re.escape(text)): check_bundle(copy)


def test_missing_file_is_refused(copy):
    (copy/"model.offline.onnx").unlink()
    with pytest.raises(BundleError, match="model.offline.onnx: missing; copy the whole folder"): check_bundle(copy)


def test_runtime_misreads_the_token_tables_that_are_refused(made, layout, copy):
    "The reason for the rule of the byte 0xC6; fails when the runtime fixes it."
    import sherpa_onnx
    n = made.bundle.config["vocab_size"]
    (copy/"tokens.txt").write_text("".join(f"{s} {i}\n" for i, s in enumerate(["<blk>", "ơ", *(f"▁{i}" for i in range(2, n))])), "utf-8")
    seal(copy)
    with pytest.raises(BundleError, match="largest byte is 0xC6"): check_bundle(copy)
    runtime = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(
        tokens=str(copy / "tokens.txt"), model=str(copy / "model.onnx"), chunk_size=CHUNK, num_left_chunks=LEFT, num_threads=1
    )
    tokens, _ = transcribe_pieces(runtime, np.pad(speech(layout), (0, 16_000)), 1600)
    assert any(t.startswith("▁") for t in tokens), "a valid table has a space there"


def test_refused_model_leaves_the_bundle_unchanged(made, layout, monkeypatch, tmp_path):
    before, config = (made.bundle.folder/"SHA256SUMS").read_bytes(), ExportConfig(**CONFIG | dict(min_utterances=1000))
    kept = shutil.copytree(made.bundle.folder, tmp_path/"graphs")
    monkeypatch.setattr(exporting, "write_graphs", lambda model, folder, *_: [shutil.copy(p, folder) for p in kept.glob("*.onnx")])
    with pytest.raises(ExportError, match=r"no bundle is written. \(1\) 6 test utterances are fewer than export.min_utterances \(1000\)"):
        export(config, STREAM, layout)
    assert (made.bundle.folder/"SHA256SUMS").read_bytes() == before and check_bundle(made.bundle.folder)
    assert read_json(layout.comparison/"export.json")["utterances"] == 6, "the figures are written for a refused model too"


# Confidence

def test_confidences_are_raw_if_dev_has_few_words(made):
    assert {*made.report["confidence"]} == {"full", "stream"}
    for way, found in made.report["confidence"].items():
        assert (
            0 < found["held_out"] < found["words"]
            and found["map"] is made.bundle.calibration(way) is None
            and "are needed: confidences are raw" in found["why"]
        )


def test_confidences_are_calibrated_if_dev_has_enough_words(made, layout, monkeypatch, tmp_path):
    "The references of dev are the bundle's own transcripts, so raw confidences are too low."
    kept, there, recogniser = (
        shutil.copytree(made.bundle.folder, tmp_path / "graphs"),
        Elsewhere(layout.root),
        load_recogniser(made.bundle.folder),
    )
    object.__setattr__(there, "kind", "mapped")
    texts = {row["id"]: recogniser(read_audio(layout.prepared/row["audio_filepath"]))[0] for row in read_jsonl(layout.manifest("dev"))}
    monkeypatch.setattr(
        exporting, "read_jsonl", lambda path: [row | dict(text=texts.get(row["id"], row["text"])) for row in read_jsonl(path)]
    )
    monkeypatch.setattr("ai2text.decoding.calibration.MIN_WORDS", 1)
    monkeypatch.setattr(exporting, "write_graphs", lambda model, folder, *_: [shutil.copy(p, folder) for p in kept.glob("*.onnx")])
    export(ExportConfig(**CONFIG), STREAM, there)
    bundle, report = check_bundle(there.bundle), read_json(there.comparison/"export.json")["confidence"]
    full = report["full"]
    assert {*report} == {"full", "stream"} and bundle.config["calibration"] == {
        way: found["map"] for way, found in report.items() if found["map"]
    }
    assert full["map"] and full["mapped"]["log_loss"] < full["raw"]["log_loss"] and full["mapped"]["error"] < full["raw"]["error"]
    text, raw = recogniser(speech(layout))
    mapped = load_recogniser(bundle.folder)(speech(layout))
    assert raw and mapped == (text, calibrated_words(raw, full["map"])) and mapped[1] != raw


# Every family

class Elsewhere(Layout):
    "The same workspace with another place for the output of export."
    bundle = property(lambda self: self.root/f"elsewhere/{self.kind}/bundle")
    comparison = property(lambda self: self.root/f"elsewhere/{self.kind}/comparison")


@pytest.fixture(scope="module")
def families(layout, tmp_path_factory):
    "A model of each other kind, published beside the streaming Conformer."
    tokenizer, folder = load_tokenizer(layout.tokenizer), tmp_path_factory.mktemp("released")
    torch.manual_seed(2)
    encoder = WhisperCTC.start(dict(init=str(small_whisper(folder, ["một hai ba"], max_source_positions=60, window_seconds=30))), tokenizer)
    torch.nn.init.normal_(encoder.head.weight, std=0.3)
    for name, model, family in (("encoder", encoder, "whisper_ctc"), ("whisper", toy_whisper(()), "whisper")):
        save_model(layout.model(name), model, beside=lambda part, model=model: model.tokenizer.save(part/"tokenizer"), family=family)
    return layout


@pytest.mark.parametrize(
    "name, kind, files",
    [("whole", "ctc", {"model.onnx"}), ("encoder", "chunk_ctc", {"model.onnx", "model.offline.onnx"}), ("whisper", "whisper", {"float32"})],
)
def test_bundle_of_every_family_agrees_with_its_model(families, name, kind, files, tmp_path, capsys):
    there = Elsewhere(families.root)
    object.__setattr__(there, "kind", kind)
    rows, model = export(ExportConfig(**CONFIG | dict(model=name)), STREAM, there), load_model(there.model(name))
    bundle, report = check_bundle(there.bundle), read_json(there.comparison/"export.json")
    assert (bundle.kind, bundle.streams, report["kind"], bundle.config["name"]) == (kind, kind == "chunk_ctc", kind, name)
    assert len(rows) == 6
    graphs = report["graphs"]
    assert {*graphs} == files and not any(o["texts_differ"] or o["apart"] > 1e-3 for o in graphs.values()), graphs
    assert sum(len(r["hypothesis"]) for r in rows) > 20, "empty texts agree trivially"
    assert report["wer"]["full"]["wer"] == bundle.config["wer"]["full"]["wer"] and "**Not measured.**" not in (
        bundle.folder / "README.md"
    ).read_text("utf-8")

    wave = speech(families)
    soundfile.write(tmp_path/"speech.wav", wave, 16_000)
    text = model.transcribe(collate([wave], [""], ["u"]))[0].text
    if kind != "whisper":
        (code, *_) = [c for c in blocks(bundle.folder, "python") if "onnxruntime" in c]
        shutil.copy(tmp_path/"speech.wav", bundle.folder)
        env = os.environ | dict(PYTHONIOENCODING="utf-8")
        done = subprocess.run([sys.executable, "-c", code], cwd=bundle.folder, capture_output=True, text=True, env=env)
        (bundle.folder/"speech.wav").unlink()
        assert done.returncode == 0 and " ".join(done.stdout.split()) == text, done.stderr
    for folder in (bundle.folder, there.model(name)):
        assert transcribe(folder, [tmp_path/"speech.wav"], processes=1) == 0
        assert " ".join(capsys.readouterr().out.split()) == text, folder
    if kind == "whisper": # two processes, as the command starts them
        soundfile.write(tmp_path/"again.wav", wave, 16_000)
        for folder in (bundle.folder, there.model(name)):
            done = subprocess.run(
                [
                    sys.executable, "-m", "ai2text.pipeline.cli", "transcribe", folder, tmp_path / "speech.wav",
                    tmp_path / "again.wav", "--processes", "2"
                ],
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0 and done.stdout.count(text) == 2, done.stdout + done.stderr
    if kind != "chunk_ctc": assert transcribe(bundle.folder, [tmp_path/"speech.wav"], processes=1, int8=True) == 0
    (next(bundle.folder.glob("**/model.*"))).write_bytes(b"")
    with pytest.raises(BundleError, match="its content does not match SHA256SUMS"): check_bundle(bundle.folder)


def test_model_without_a_kind_is_refused(layout, monkeypatch):
    monkeypatch.setattr(exporting, "load_model", lambda folder: SimpleNamespace(tokenizer=None))
    with pytest.raises(ConfigError, match="SimpleNamespace: no kind of bundle fits"): export(ExportConfig(**CONFIG), STREAM, layout)


def test_report_names_another_recommendation(layout):
    assert "models were not compared" in recommended(ExportConfig(model="m"), layout)
    write_json(layout.root/"comparison/compare.json", dict(recommendation=dict(model="whole"), models=[]))
    assert "m is exported, but the comparison recommends whole" in recommended(ExportConfig(model="m"), layout)
    assert "as the comparison recommends" in recommended(ExportConfig(model="whole"), layout)


AGAIN = """
import sys
from pathlib import Path
from ai2text.serving.export import write_graphs
from ai2text.models.store import load_model
write_graphs(load_model(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
"""


@pytest.mark.slow
def test_same_weights_same_bytes(made, layout, tmp_path):
    "In another process, with another hash seed and another folder."
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, layout.model("m"), tmp_path, str(CHUNK), str(LEFT)], capture_output=True,
        text=True, env=os.environ | dict(PYTHONHASHSEED="7")
    )
    assert done.returncode == 0, done.stderr
    for name in ("model.onnx", "model.int8.onnx", "model.offline.onnx"):
        assert (tmp_path / name).read_bytes() == (made.bundle.folder / name).read_bytes(), name

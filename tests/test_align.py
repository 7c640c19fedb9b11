"Segmentation of long recordings into a corpus, choice of readings, and errors of the commands."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ai2text.audio.io import encode
from ai2text.core.batch import SAMPLE_RATE
from ai2text.core.files import read_json, read_jsonl, write_jsonl
from ai2text.core.layout import Layout
from ai2text.core.sections import CorpusConfig, PrepareConfig
from ai2text.corpora.corpus import make_corpus
from ai2text.corpora.prepare import prepare
from ai2text.decoding.align import align_pairs
from ai2text.decoding.readings import score_all_readings
from ai2text.models.store import build_model, save_model
from ai2text.pipeline.cli import main
from ai2text.testing.tone_model import ToneModel, say_in_tones
from ai2text.text.tokenizer import CharTokenizer

TEXTS = """trời hôm nay đẹp quá|ông ấy đi chợ từ sớm|chúng ta về nhà thôi|không ai biết chuyện ấy|cây cau cao hơn mái nhà|em bé ngủ trên võng|mẹ nấu cơm dưới bếp|thuyền ra khơi đánh cá
gió thổi ngoài hiên lạnh|lá rụng đầy sân trường|trăng lên trên đầu núi|quê hương là chùm khế ngọt""".replace("\n", "|").split("|")


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    "A folder with three recordings in tones, their texts beside them; each text has a sentence that is not spoken."
    home, rng = tmp_path_factory.mktemp("lessons"), np.random.default_rng(0)
    for n in range(3):
        spoken, pause = TEXTS[4*n:4*n + 4], 0.001*rng.standard_normal(8000).astype(np.float32)
        wave = np.concatenate([part for text in spoken for part in (pause, say_in_tones(text, rng))] + [pause])
        (home/f"bài {n}.flac").write_bytes(encode(wave, SAMPLE_RATE, "flac"))
        (home/f"bài {n}.txt").write_text("\n".join([*spoken[:2], "con đường xa tít tắp", *spoken[2:]]), "utf-8")
    return home


def test_segmented_recordings_are_imported_and_prepared(lessons, tmp_path, capsys):
    pairs = [(p, p.with_suffix(".txt")) for p in sorted(lessons.glob("*.flac"))]
    assert align_pairs(ToneModel().eval(), pairs, tmp_path/"book", window=10.) == []
    output = capsys.readouterr().out
    assert "bài 1.flac: 4 of 5 sentences kept, as 4 utterances" in output and "source: nemo" in output, output
    assert [d["text"] for d in read_jsonl(tmp_path/"book/report/dropped.jsonl")] == ["con đường xa tít tắp"]*3
    layout = Layout(tmp_path)
    make_corpus(
        CorpusConfig(source="nemo", path=str(tmp_path / "book"), transcripts="manifest.jsonl", processes=1), "book", layout.corpus("book")
    )
    stats = prepare(PrepareConfig(tokenizer="char", processes=1, dev_share=0.3, test_share=0.3), layout.corpora, layout.prepared)
    assert (stats["utterances"], stats["rejected"]) == (12, 0)
    rows = [row for split in ("train", "dev", "test") for row in read_jsonl(layout.manifest(split))]
    assert sorted(row["text"] for row in rows) == sorted(TEXTS) and {row["speaker"] for row in rows} == {"bài 0", "bài 1", "bài 2"}
    assert all(0.12*len(row["text"]) <= row["duration"] <= 0.12*len(row["text"]) + 0.5 for row in rows)


def test_corrupt_recording_is_reported_and_others_are_kept(lessons, tmp_path, capsys):
    (tmp_path/"in").mkdir()
    for p in lessons.iterdir(): (tmp_path/"in"/p.name).write_bytes(p.read_bytes())
    (tmp_path/"in/hỏng.wav").write_bytes(b"RIFF")
    (tmp_path/"in/hỏng.txt").write_text("xin chào", "utf-8")
    pairs = [(p, p.with_suffix(".txt")) for p in sorted((tmp_path/"in").iterdir()) if p.suffix != ".txt"]
    errors = align_pairs(ToneModel().eval(), pairs, tmp_path/"book", window=10.)
    assert len(errors) == 1 and "hỏng.wav" in errors[0] and errors[0] in capsys.readouterr().err
    assert len(read_jsonl(tmp_path/"book/manifest.jsonl")) == 12
    assert read_json(tmp_path/"book/report/align.json")["errors"] == errors


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "An untrained Conformer."
    home, tokenizer = tmp_path_factory.mktemp("models"), CharTokenizer()
    save_model(
        home / "conformer", build_model(dict(family="conformer", size="tiny"), tokenizer),
        beside=lambda part: tokenizer.save(part / "tokenizer"), family="conformer"
    )
    return home


@pytest.mark.parametrize("command", ["align", "readings"])
def test_help_describes_each_option(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    assert e.value.code == 0
    assert "folder of a trained model with CTC scores" in " ".join(capsys.readouterr().out.split())


def test_errors_of_align_are_one_line(lessons, models, tmp_path, capsys):
    recording = str(lessons/"bài 0.flac")
    for words, error in {
        ("none", recording): "none/config.json: no model is published here",
        (str(models / "conformer"), recording): "the model cannot tell which text is spoken",
        (str(models / "conformer"), "none.wav"): "none.wav: no such file or folder",
        (str(models / "conformer"), recording, "none.txt"): "none.txt: no such file; write the transcript",
        (str(models / "conformer"), str(lessons), "a.txt"): "the texts of a folder are beside its recordings",
    }.items():
        assert main(["align", *words, "--out", str(tmp_path/"out")]) == 2, words
        assert error in (output := capsys.readouterr().err), output
        assert not (tmp_path/"out").exists()


def test_model_without_ctc_scores_is_refused(monkeypatch):
    from ai2text.core.params import ConfigError
    from ai2text.decoding import align
    monkeypatch.setattr(align, "load_model", lambda folder: type("Whisper", (), {})())
    with pytest.raises(ConfigError, match="models/w: Whisper has no CTC scores; use a model of a CTC family"):
        align.load_ctc_model(Path("models/w"))


def test_spoken_reading_is_used_by_prepare(tmp_path, capsys):
    "prepare keeps the readings, a model chooses, and the next prepare uses its choice; a changed text gets its first reading again."
    rng, layout, folder = np.random.default_rng(0), Layout(tmp_path), tmp_path/"data/corpus/lessons"
    folder.mkdir(parents=True)
    spoken = {
        "Nhà có 105 cây": "nhà có một trăm lẻ năm cây", "Lúc 24 giờ": "lúc hai mươi bốn giờ",
        "Giá 2.000 đồng": "giá hai ngàn đồng", "Trang 35": "trang ba mươi lăm"
    } | {text: text for text in TEXTS[:4]}
    rows = [
        dict(
            id=f"u{n}", audio_filepath=f"{n}.wav", text_raw=written, speaker=f"s{n}",
            split="dev" if n == 6 else "test" if n == 7 else "train"
        )
        for n, written in enumerate(spoken)
    ]
    for n, text in enumerate(spoken.values()): (folder/f"{n}.wav").write_bytes(encode(say_in_tones(text, rng), SAMPLE_RATE, "wav"))
    write_jsonl(folder/"manifest.jsonl", rows)
    cfg = PrepareConfig(tokenizer="char", processes=1)
    assert prepare(cfg, layout.corpora, layout.prepared, root=tmp_path)["spoken"]["several"] == 4
    found = list(score_all_readings(ToneModel().eval(), read_jsonl(layout.manifest("train")), layout.prepared))
    assert {f["id"]: f["text"] for f in found} == {f"u{n}": text for n, text in enumerate(spoken.values()) if n < 4}
    assert [f["first"] for f in sorted(found, key=lambda f: f["id"])] == [False, True, False, True]
    write_jsonl(tmp_path/"spoken.jsonl", found)
    cfg = replace(cfg, spoken="spoken.jsonl")
    assert prepare(cfg, layout.corpora, layout.prepared, root=tmp_path)["spoken"] == dict(
        several=4, chosen=4, other_than_first=2, stale=0, stale_ids=[]
    )
    assert {row["id"]: row["text"] for row in read_jsonl(layout.manifest("train"))} == {
        f"u{n}": text for n, text in enumerate(spoken.values()) if n < 6
    }
    again = {f["id"]: f["text"] for f in score_all_readings(ToneModel().eval(), read_jsonl(layout.manifest("train")), layout.prepared)}
    assert again == {f["id"]: f["text"] for f in found}
    write_jsonl(folder/"manifest.jsonl", [dict(row, text_raw="Nhà có 106 cây") if row["id"] == "u0" else row for row in rows])
    assert prepare(cfg, layout.corpora, layout.prepared, root=tmp_path)["spoken"]["stale_ids"] == ["u0"]
    assert next(row["text"] for row in read_jsonl(layout.manifest("train")) if row["id"] == "u0").startswith("nhà có một trăm linh sáu")

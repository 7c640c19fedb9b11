"Two services on the same recorded streams."
import json

import numpy as np
import pytest
import soundfile as sf

from ai2text.core.files import write_jsonl
from ai2text.core.params import ConfigError
from ai2text.serving.shadow_test import run_shadow_test, pick
from ai2text.testing.toy_bundle import WORDS, toy_bundle, whistle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return toy_bundle(folder/"a", chunk=4, deaf=("sáu",)), toy_bundle(folder/"b", chunk=4)


def manifest(folder, texts, references=True):
    rows = []
    for i, text in enumerate(texts):
        wave, words = whistle(text, pause=0.1)
        sf.write(folder/f"{i}.wav", wave, 16_000)
        rows.append(dict(id=f"call-{i}", audio_filepath=f"{i}.wav") | (dict(text=text, words=words) if references else {}))
    write_jsonl(folder/"manifest.jsonl", rows)
    return folder/"manifest.jsonl"


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list(WORDS), 3)) for _ in range(count)]


def test_ab_in_real_time(bundles, tmp_path):
    references = texts(12)
    table = run_shadow_test(*bundles, manifest(tmp_path, references), share=0.5, streams=6, to=tmp_path/"out.json")
    found = json.loads((tmp_path/"out.json").read_text("utf-8"))
    chosen = {f"call-{i}" for i in range(12) if pick(f"call-{i}", 0.5)}
    names = {side: {t["id"] for t in results} for side, results in found["answers"].items()}
    assert names["B"] == chosen and not names["A"] & chosen and len(names["A"] | names["B"]) == 12
    lost = sum(t.split().count("sáu") for i, t in enumerate(references) if f"call-{i}" not in chosen)
    assert found["sides"]["A"]["wer"] == pytest.approx(lost/(3*len(names["A"]))) and found["sides"]["B"]["wer"] == 0
    assert found["difference"]["paired"] is False and "disagreement" not in found
    for side in found["sides"].values():
        assert (
            not side["errors"] and side["service"]["n"] > 0 and side["word"]["n"] > 0 and side["final"]["p50"] > 0 and side["flicker"] == 0
        )
    assert "WER of A minus that of B" in table and "final latency p50, p95" in table


def test_shadow_without_references(bundles, tmp_path):
    spoken = ["một sáu", "hai ba", "sáu sáu", "bốn năm"]
    run_shadow_test(*bundles, manifest(tmp_path, spoken, references=False), share=1., shadow=True, fast=True, to=tmp_path/"out.json")
    found = json.loads((tmp_path/"out.json").read_text("utf-8"))
    assert [found["sides"][s]["sessions"] for s in "AB"] == [4, 4] and found["sides"]["A"]["wer"] is None and not found["correlations"]
    assert found["disagreement"] == 3/8  # A does not recognise sáu
    assert found["sides"]["A"]["empty"] == 1/4 and found["sides"]["B"]["empty"] == 0
    assert found["sides"]["A"]["confidence"] < found["sides"]["B"]["confidence"]


@pytest.mark.parametrize("kind", ["chunk_ctc", "ctc", "whisper"])
def test_bundles_of_different_kinds_are_compared(bundles, tmp_path, kind):
    other, audio = toy_bundle(tmp_path/"other", kind=kind), manifest(tmp_path, ["một hai ba", "hai sáu"])
    run_shadow_test(bundles[1], other, audio, share=1., shadow=True, fast=True, vad="loudness", to=tmp_path/"out.json")
    found = json.loads((tmp_path/"out.json").read_text("utf-8"))
    assert (
        found["disagreement"] == 0
        and [found["sides"][s]["wer"] for s in "AB"] == [0, 0]
        and not any(s["errors"] for s in found["sides"].values())
    )
    assert all(0 < s["confidence"] <= 1 and s["final"]["n"] == 2 for s in found["sides"].values())


def test_share_without_sessions_is_an_error(bundles, tmp_path):
    with pytest.raises(ConfigError, match="none goes to B"): run_shadow_test(*bundles, manifest(tmp_path, texts(2)), share=0.)
    with pytest.raises(ConfigError, match="is not between 0 and 1"): run_shadow_test(*bundles, tmp_path/"manifest.jsonl", share=2.)

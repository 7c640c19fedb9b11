"A project's own abbreviation and reading are used by prepare, shards, the language model, hotwords and scores."
import json

import pytest

from ai2text.core.batch import Hypothesis
from ai2text.core.files import read_json, read_jsonl, write_jsonl
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.core.sections import PrepareConfig, ShardsConfig
from ai2text.corpora.checks import SPLITS
from ai2text.corpora.prepare import prepare
from ai2text.data.shard_index import load_index
from ai2text.data.shards import create_shards, write_shards
from ai2text.decoding.beam_search import Decoder
from ai2text.decoding.ngram_lm import SPECIAL_WORDS, build_lm
from ai2text.evaluation.score_files import score_files
from ai2text.evaluation.score_split import score_model, split_loader
from ai2text.pipeline.cli import main
from ai2text.testing.workspace import tiny_workspace
from ai2text.text.normalise import NORMALISER, Normaliser, normaliser_name
from ai2text.text.tokenizer import CharTokenizer, load_tokenizer
from ai2text.evaluation.variants import read_variants

WRITTEN, SPOKEN = "Chị Lan đến CTXH lúc HT45 mở cửa", "chị lan đến công tác xã hội lúc hầm thứ bốn lăm mở cửa"


@pytest.fixture(scope="module")
def layout():
    "A prepared and sharded workspace in which the longest utterance of each split is `WRITTEN`, followed by a different number."
    layout = Layout(tiny_workspace("corpus"))
    (layout.root/"short.tsv").write_text("CTXH\tcông tác xã hội\n", "utf-8")
    (layout.root/"mine.tsv").write_text("HT45\thầm thứ bốn lăm\n", "utf-8")
    manifest = layout.corpus("demo")/"manifest.jsonl"
    rows = read_jsonl(manifest)
    longest = [max((i for i, r in enumerate(rows) if r["split"] == split), key=lambda i: rows[i]["duration"]) for split in SPLITS]
    for n, i in enumerate(longest, 2): rows[i] |= dict(text_raw=f"{WRITTEN} {n}", id=f"mine-{rows[i]['split']}")
    write_jsonl(manifest, rows)
    prepare(
        PrepareConfig(
            tokenizer="char", processes=1, abbreviations="short.tsv", readings="mine.tsv",
            max_characters_per_second=1000.0, max_reject_share=0.3
        ),
        layout.corpora,
        layout.prepared,
        root=layout.root,
    )
    for split in SPLITS:
        write_shards(
            read_jsonl(layout.manifest(split)), layout.split_shards(split), layout.split_index(split),
            ShardsConfig(shard_size=16, processes=1), audio_root=layout.prepared
        )
    return layout


@pytest.fixture(scope="module")
def normaliser(layout): return Normaliser.load(layout.prepared/"normaliser.json")


def test_prepare_records_the_normaliser(layout, normaliser):
    "In the manifests, statistics, tokenizer and index."
    assert normaliser(WRITTEN) == SPOKEN != NORMALISER(WRITTEN)
    assert {r["text"] for split in SPLITS for r in read_jsonl(layout.manifest(split)) if r["id"].startswith("mine")} == {
        f"{SPOKEN} {n}" for n in ("hai", "ba", "bốn")
    }
    name = normaliser_name(normaliser)
    assert read_json(layout.prepared/"stats.json")["normaliser"] == name != normaliser_name(NORMALISER)
    assert load_tokenizer(layout.tokenizer).normaliser == normaliser
    assert {load_index(layout.split_index(split)).normaliser for split in SPLITS} == {name}
    assert read_json(layout.prepared/"stats.json")["readings"]["abbreviation"]["utterances"] >= 3


def test_shards_language_model_and_hotwords_use_the_normaliser_of_their_folder(layout, normaliser, tmp_path):
    (tmp_path/"t.json").write_text(json.dumps({"a": WRITTEN}), "utf-8")
    (tmp_path/"a.wav").write_bytes(next(layout.corpus("demo").rglob("*.wav")).read_bytes())
    (tmp_path/"text.txt").write_text(WRITTEN + "\n", "utf-8")
    index = create_shards(tmp_path, tmp_path/"t.json", tmp_path/"shards", processes=1, normaliser=layout.root)
    assert index.characters.tolist() == [len(SPOKEN)] and index.normaliser == normaliser_name(normaliser)
    assert Normaliser.load(tmp_path/"shards/normaliser.json") == normaliser
    lm = build_lm([tmp_path/"text.txt"], tmp_path/"lm", order=2, processes=1, normaliser=tmp_path/"shards")
    assert {*lm.words} - {*SPECIAL_WORDS} == {*SPOKEN.split()} and lm.about["normaliser"] == index.normaliser
    tokenizer = load_tokenizer(layout.tokenizer)
    assert Decoder(tokenizer, tmp_path/"lm", hotwords=["CTXH"]).hotwords == {("công", "tác", "xã", "hội"): 3.}
    with pytest.raises(ConfigError, match="which has other tables; make it again with `ai2text lm --text FILES --to LM --normaliser"):
        Decoder(CharTokenizer(), tmp_path / "lm")


class Perfect:
    "A model without errors."
    def transcribe(self, batch): return [Hypothesis(text) for text in batch.transcripts]


def test_a_correct_hypothesis_scores_zero_in_every_form_of_the_reference(layout, normaliser, tmp_path, capsys):
    manifest = read_jsonl(layout.manifest("test"))
    score, rows = score_model(Perfect(), split_loader(layout, "test"), manifest, normaliser=normaliser, variants=read_variants())
    assert (score.wer, score.wer_variants, score.normaliser) == (0, 0, normaliser_name(normaliser))
    raw = [dict(id=r["id"], text=r["reference_raw"]) for r in rows]
    write_jsonl(tmp_path/"ref.jsonl", raw)
    write_jsonl(tmp_path/"hyp.jsonl", [dict(id=r["id"], pred_text=r["hypothesis"]) for r in rows])
    found = {
        n: json.loads(score_files(tmp_path / "ref.jsonl", tmp_path / "hyp.jsonl", normaliser=n, json=True))
        for n in (layout.tokenizer, "none")
    }
    assert found[layout.tokenizer]["wer"] == 0 < found["none"]["wer"]
    assert found[layout.tokenizer]["normaliser"] == score.normaliser
    assert main(["score", str(tmp_path/"ref.jsonl"), str(tmp_path/"hyp.jsonl"), "--normaliser", str(layout.root)]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("WER 0.0% (0.0 to 0.0), CER 0.0%")
    assert main(["score", str(tmp_path/"ref.jsonl"), str(tmp_path/"none")]) == 2 and "none: no such file" in capsys.readouterr().err


def test_shards_of_another_normaliser_are_refused(layout, normaliser):
    "An index made with other tables than the tokenizer, and one of another version."
    path = layout.split_index("dev")
    whole = path.read_text("utf-8")
    try:
        others = {normaliser_name(NORMALISER): "which has other tables", "vi-0 12": f"the normaliser here is {normaliser_name(normaliser)}"}
        for name, message in others.items():
            path.write_text(whole.replace(normaliser_name(normaliser), name), "utf-8")
            message = f"dev.json: made with normaliser {name}, .*{message}; write the shards again with `dvc repro`"
            with pytest.raises(ConfigError, match=message): split_loader(layout, "dev")
    finally: path.write_text(whole, "utf-8")

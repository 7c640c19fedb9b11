"Released checkpoints that are missing, wrong or corrupt; Whisper through trainer, checkpoint and published folder."
import json
import shutil
import socket

import jiwer
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ai2text.core.batch import collate
from ai2text.data.written import as_written
from ai2text.training.budget import Budget
from ai2text.models.store import build_model, load_config, load_weights, save_model
from ai2text.core.files import read_json, read_jsonl, write_json
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.training.optimizer import make_optimizer
from ai2text.text.tokenizer import CharTokenizer
from ai2text.training.trainer import TrainerOptimized
from ai2text.models.whisper import Whisper
from ai2text.core.sections import CompareConfig, InitConfig, StreamConfig, TrainConfig
from ai2text.evaluation.compare import compare_models, comparison_rows
from ai2text.evaluation.evaluate import evaluate
from ai2text.testing.small_whisper import small_whisper
from ai2text.testing.workspace import tiny_workspace
from ai2text.training.init import init
from ai2text.training.publish import publish, summary
from ai2text.training.run import fit

TEXTS = ["xin chào các bạn", "hôm nay trời đẹp quá", "một hai ba bốn năm"]
NAME, REVISION = "openai/whisper-small", "0123456789"*4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A valid checkpoint."
    torch.manual_seed(0)
    return small_whisper(tmp_path_factory.mktemp("whisper")/"small", TEXTS)


@pytest.fixture
def folder(whole, tmp_path):
    "A copy to corrupt."
    shutil.copytree(whole, tmp_path/"small")
    return tmp_path/"small"


@pytest.fixture
def no_network(monkeypatch):
    "Any network access fails the test."
    calls = []
    def refuse(*args, **kwargs):
        calls.append(args)
        raise OSError("no network in this test")
    for name in ("getaddrinfo", "create_connection"): monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not calls, f"network access: {calls}"


def batch_of(*lengths):
    waves = [np.random.default_rng(n).standard_normal(n).astype(np.float32)*0.1 for n in lengths]
    return collate(waves, TEXTS[:len(lengths)], [str(i) for i in range(len(lengths))])


def edit(path, **values): write_json(path, read_json(path) | values)


def refused(params): return str(pytest.raises(ConfigError, Whisper.start, params, None).value)


# Where the weights come from

def test_a_folder_needs_no_network(whole, no_network):
    model = Whisper.start(dict(init=str(whole)), None)
    assert len(model.eval().transcribe(batch_of(16_000))) == 1


@pytest.mark.parametrize(
    "params, message",
    [
        (dict(init=NAME), f"whisper.revision: '' does not pin {NAME}; write the 40 digits of a commit"),
        (dict(init=NAME, revision="main"), f"whisper.revision: 'main' does not pin {NAME}"),
        (
            dict(init=NAME, revision=REVISION),
            f"whisper.init: {NAME} at {REVISION} is not in this machine's cache, and nothing is fetched while a stage runs; "
            f"fetch it first: hf download {NAME} --revision {REVISION} --include '*.json' --include '*.txt' --include '*.safetensors'",
        ),
        (dict(init="./no/such/folder"), "whisper.init: there is no folder "),
        (dict(init="../secret"), "is no released name with its revision"),
        (dict(init=NAME, revision=REVISION, size="base"), "whisper.size: no such parameter"),
        (dict(init=NAME, revision=REVISION, trust_remote_code=True), "whisper.trust_remote_code: no such parameter"),
    ],
)
def test_a_missing_checkpoint_is_an_error_with_the_fix(params, message, no_network): assert message in refused(params)


def test_a_folder_has_no_revision(whole):
    assert "is a folder and has no revisions; leave revision out" in refused(dict(init=str(whole), revision=REVISION))


def test_a_released_name_comes_from_the_cache(whole, tmp_path, monkeypatch, no_network):
    "A missing file of the cache is named, with the command that fetches it."
    snapshot = tmp_path/"hub/models--someone--whisper-small/snapshots"/REVISION
    shutil.copytree(whole, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    params = dict(init="someone/whisper-small", revision=REVISION)
    model = Whisper.start(params, None)
    assert (model.config["init"], model.config["revision"]) == (params["init"], REVISION)
    (snapshot/"model.safetensors").unlink()
    assert f"model.safetensors: no such file; fetch it: hf download someone/whisper-small --revision {REVISION}" in refused(params)


# What the files hold

def test_an_english_only_whisper_is_refused(folder):
    edit(folder/"generation_config.json", is_multilingual=False)
    assert "an English-only Whisper; take the multilingual one, whose name lacks .en" in refused(dict(init=str(folder)))


def test_a_vocabulary_without_vietnamese_is_refused(tmp_path):
    small_whisper(tmp_path/"small", TEXTS, without="vi")
    assert "its vocabulary lacks <|vi|>; take a multilingual Whisper" in refused(dict(init=str(tmp_path/"small")))


def test_tokens_and_weights_must_match(folder):
    edit(folder/"config.json", vocab_size=100)
    assert "config.json says vocab_size 100; they are of different checkpoints, copy the whole checkpoint there" in refused(
        dict(init=str(folder))
    )


def test_shapes_of_config_and_weights_must_match(folder):
    edit(folder/"config.json", d_model=64)
    assert "model.safetensors: of another shape than config.json says" in refused(dict(init=str(folder)))


def test_a_checkpoint_converted_for_another_runtime_is_refused(folder):
    write_json(folder/"config.json", dict(alignment_heads=[], lang_ids=[]))
    (folder/"model.bin").write_bytes(b"x")
    assert "converted for CTranslate2, which cannot be trained; name the checkpoint that it was made from" in refused(
        dict(init=str(folder))
    )


def test_a_tokenizer_that_lost_its_first_merge_is_refused(folder):
    about = read_json(folder/"tokenizer.json")
    about["model"]["merges"] = about["model"]["merges"][1:]
    write_json(folder/"tokenizer.json", about)
    assert "1 tokens of its vocabulary are made by no merge, such as " in refused(dict(init=str(folder)))


def test_weights_with_nan_are_named(folder):
    path = folder/"model.safetensors"
    save_file(
        {k: v.fill_(float("nan")) if k.endswith("layers.0.fc1.weight") else v for k, v in load_file(path).items()}, path, dict(format="pt")
    )
    assert "holds values that are no numbers" in refused(dict(init=str(folder)))


def test_an_error_names_the_key_in_params(folder):
    with pytest.raises(ConfigError, match=r"^models\.mine\.freeze_layers: 3, but this encoder has 2 layers"):
        build_model(dict(family="whisper", init=str(folder), freeze_layers=3), None, name="mine")


def test_a_relative_folder_starts_from_the_project(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path/"weights/small")
    for name in ("params.yaml", "dvc.yaml"): (tmp_path/name).write_text("{}\n")
    (tmp_path/"nbs/stages").mkdir(parents=True)
    monkeypatch.chdir(tmp_path/"nbs/stages")
    assert Whisper.start(dict(init="weights/small"), None).config["init"] == "weights/small"
    assert "there is no folder " in refused(dict(init="weights/smal"))


def test_another_architecture_is_refused(folder):
    edit(folder/"config.json", model_type="bart")
    assert "config.json: model_type 'bart' is no whisper" in refused(dict(init=str(folder)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder/name).unlink()
    message = refused(dict(init=str(folder)))
    assert name in message and "copy the whole checkpoint there" in message


@pytest.mark.parametrize("corrupt", [lambda data: data[:len(data)//2], lambda data: b"\xff"*8 + data[8:], lambda data: b""],
                         ids=["truncated", "header overwritten", "empty"])
def test_corrupt_weights_are_named(folder, corrupt):
    path = folder/"model.safetensors"
    path.write_bytes(corrupt(path.read_bytes()))
    message = refused(dict(init=str(folder)))
    assert message.startswith(f"{path}: cannot be read (") and message.endswith("delete it, and copy the whole checkpoint there")


def test_missing_parameters_are_named(folder):
    path = folder/"model.safetensors"
    save_file({k: v for k,v in load_file(path).items() if "decoder.layers.1.fc1" not in k}, path, dict(format="pt"))
    assert "lacks parameters, such as decoder.layers.1.fc1.weight" in refused(dict(init=str(folder)))


def test_a_pickle_is_never_read(folder):
    "Not even when it is the only file with weights."
    (folder/"model.safetensors").rename(folder/"pytorch_model.bin")
    assert "weights in .bin files can run code and are never read: name a revision that has safetensors" in refused(dict(init=str(folder)))


def test_code_beside_the_weights_is_never_run(folder, tmp_path):
    (folder/"modeling_evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nclass Evil: pass\n")
    edit(folder/"config.json", auto_map=dict(AutoConfig="modeling_evil.Evil", AutoModelForSpeechSeq2Seq="modeling_evil.Evil"))
    Whisper.start(dict(init=str(folder)), None)
    assert not (tmp_path/"ran").exists()


def test_a_corrupt_tokenizer_is_named(folder):
    (folder/"tokenizer.json").write_text("{", "utf-8")
    assert f"{folder}: its tokenizer cannot be read (" in refused(dict(init=str(folder)))


def test_half_precision_weights_are_trained_in_float32(folder):
    path = folder/"model.safetensors"
    save_file({k: v.half() for k,v in load_file(path).items()}, path, dict(format="pt"))
    edit(folder/"config.json", dtype="float16")
    assert {p.dtype for p in Whisper.start(dict(init=str(folder)), None).parameters()} == {torch.float32}


def test_freezing_more_layers_than_there_are_is_refused(whole):
    assert "whisper.freeze_layers: 3, but this encoder has 2 layers" in refused(dict(init=str(whole), freeze_layers=3))


# Between trainer and published folder

@pytest.mark.parametrize("optimizer, lr", [("muon", 1e-2), ("adamw", 5e-3)])
def test_averaged_weights_are_published_and_loaded(optimizer, lr, tmp_path):
    "Overfits one batch; the averaged weights, with the tied embedding, are published."
    torch.manual_seed(0)
    params = dict(d_model=32, layers=1, heads=2, ff=64, window_seconds=1., max_tokens=32, window="full", freq_masks=0, time_masks=0)
    model, batch = Whisper.start(params, CharTokenizer()), batch_of(9_000, 16_000, 12_000)
    trainer = TrainerOptimized(model, make_optimizer(model, optimizer, lr), batch_size=None, accumulation_steps=1, gradient_clip_val=0.,
                               ema_decay=0.8, device="cpu")
    trainer.fit([batch]*80, Budget(max_steps=80))
    weights = trainer.weights()
    saved = save_model(tmp_path/"m", model, weights, lambda part: model.tokenizer.save(part/"tokenizer"), "whisper")
    json.dumps(model.config)
    own = load_weights(Whisper.from_config(load_config(saved)["config"], Whisper.load_tokenizer(saved/"tokenizer")), saved).eval()
    assert [h.text for h in own.transcribe(batch)] == batch.transcripts
    with trainer.published() as published: assert own.transcribe(batch) == published.transcribe(batch)


def test_a_finetuned_model_needs_no_release(folder, tmp_path):
    model = Whisper.start(dict(init=str(folder), freeze_encoder=True), None)
    frozen = {n: p.clone() for n,p in model.named_parameters() if not p.requires_grad}
    trainer = TrainerOptimized(
        model, make_optimizer(model, "adamw", 1e-3), batch_size=None, accumulation_steps=1, checkpointing=True, device="cpu"
    )
    trainer.fit([batch_of(9_000, 32_000)]*3, Budget(max_steps=3))
    assert frozen and all(torch.equal(p, frozen[n]) for n,p in model.named_parameters() if n in frozen)
    saved = save_model(tmp_path/"m", model, trainer.weights(), lambda part: model.tokenizer.save(part/"tokenizer"), "whisper")
    shutil.rmtree(folder)
    own = load_weights(Whisper.from_config(load_config(saved)["config"], Whisper.load_tokenizer(saved/"tokenizer")), saved).eval()
    assert own.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert {n for n,p in own.named_parameters() if not p.requires_grad} == set(frozen)
    assert own.transcribe(batch_of(9_000), timestamps=True) == model.eval().transcribe(batch_of(9_000), timestamps=True)


@pytest.mark.parametrize("text", ["written", "normalised"])
def test_written_text_is_trained_scored_and_reported(text, tmp_path, monkeypatch):
    "From a corpus through training and evaluation to summary and comparison."
    layout = Layout(tiny_workspace("shards"))
    rows = read_jsonl(layout.manifest("train"))
    small_whisper(tmp_path/"small", [row["text_raw"] for row in rows], window_seconds=10, max_target_positions=100)
    init("m", InitConfig(), dict(family="whisper", init=str(tmp_path/"small"), text=text), layout)
    milestones = [dict(wer=0.3, budget_hours=1.)]
    targets, seen = Whisper._targets, []
    def recorded(self, batch, rows):
        found = targets(self, batch, rows)
        seen.extend(self.tokenizer.decode([i for i in row if i >= 0]) for row in found[1].tolist())
        return found
    monkeypatch.setattr(Whisper, "_targets", recorded)
    config = TrainConfig(max_steps=2, warmup_steps=0, threads=1, batch_seconds=20., optimizer="adamw", lr=1e-4, amp_dtype="fp32")
    metrics = publish("m", fit("m", config, milestones, layout), milestones, layout)
    monkeypatch.undo()
    expected = {" ".join(row["text_raw" if text == "written" else "text"].split()) for row in rows}
    assert seen and {t for t in seen if t} <= expected
    found, writes = evaluate("m", StreamConfig(), layout), text == "written"
    assert {"val_written_wer", "val_written_cer"} <= set(metrics) if writes else not any("written" in k for k in metrics)
    assert (found["written_wer"] is not None) == (found["written_cer_high"] is not None) == writes
    if writes:
        sides = ([as_written(r[f"{side}_raw"]) for r in read_jsonl(layout.results("m-eval")/"utterances.jsonl")]
                 for side in ("reference", "hypothesis"))
        assert found["written_wer"] == pytest.approx(jiwer.wer(*sides))
    (layout.root/"params.yaml").touch()
    assert ("as written         WER " in summary(layout.root)) == writes
    models, _ = compare_models(CompareConfig(latency=0.), layout, ["m"])
    assert ("CER as written" in comparison_rows(models)[0]) == writes

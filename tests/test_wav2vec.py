"Self-supervised encoders: equality with transformers, training, freezing, pre-training with resume, and errors of missing weights."
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ai2text.core.batch import SAMPLE_RATE, collate
from ai2text.models.store import load_config, load_weights, save_model
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError, make
from ai2text.training.optimizer import make_optimizer
from ai2text.training.pretrain import PretrainConfig, pretrain, unlabelled_loader
from ai2text.text.tokenizer import CharTokenizer
from ai2text.testing.workspace import tiny_workspace
from ai2text.training.trainer import TrainerOptimized
from ai2text.models.wav2vec import WEIGHTS, Wav2Vec2, normalise_wave

TOKENIZER = CharTokenizer()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed=0, **params):
    torch.manual_seed(seed)
    return Wav2Vec2.from_config(dict(size="tiny") | params, TOKENIZER).eval()


def noise(*lengths):
    draw = torch.Generator().manual_seed(1)
    waves = [(0.1*torch.randn(n, generator=draw) + 0.03).numpy() for n in lengths]
    return collate(waves, ["một"]*len(lengths), [f"u{i}" for i in range(len(lengths))])


def released(folder, kind, **shape):
    "Save a CTC model of transformers with random weights like a release: the base configuration, but smaller."
    import transformers
    name = dict(wav2vec2="Wav2Vec2", hubert="Hubert")[kind]
    config = getattr(transformers, f"{name}Config")(
        **dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=[16] * 7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=TOKENIZER.vocab_size
        )
        | shape
    )
    torch.manual_seed(2)
    model = getattr(transformers, f"{name}ForCTC")(config).eval()
    for n,p in model.named_parameters():
        if "layer_norm" in n: torch.nn.init.normal_(p, mean=1.*n.endswith("weight"), std=0.3) # so that norms matter
    model.save_pretrained(folder)
    return model


# The same network

@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("kind", ["wav2vec2", "hubert"])
def test_scores_are_those_of_transformers_in_a_batch_and_one_by_one(tmp_path, kind, norm):
    theirs = released(tmp_path, kind, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")
    ours = Wav2Vec2.start(dict(init=str(tmp_path)), TOKENIZER).eval()
    ours.head.load_state_dict(theirs.lm_head.state_dict())
    batch = noise(16_000, 9_000, 21_000, 500)
    with torch.no_grad():
        logits, frames = ours.encode(batch)
        for i,n in enumerate(frames.tolist()):
            one = batch[i:i+1]
            alone = theirs(normalise_wave(one.audio, one.lengths)).logits[0]
            assert len(alone) == n
            torch.testing.assert_close(logits[i,:n], alone, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.encode(one)[0][0,:n], alone, atol=1e-4, rtol=0)
    assert ours.frame_samples == 320 and ours._window == 400


def test_published_model_needs_neither_network_nor_release(tmp_path):
    theirs = released(tmp_path/"release", "wav2vec2")
    model = Wav2Vec2.start(dict(init=str(tmp_path/"release"), layer_decay=0.9, encoder=dict(mask_time_prob=0.1)), TOKENIZER).eval()
    torch.testing.assert_close(model.encoder.masked_spec_embed, theirs.wav2vec2.masked_spec_embed)
    save_model(tmp_path/"model", model, beside=lambda folder: model.tokenizer.save(folder/"tokenizer"))
    for p in (tmp_path/"release").iterdir(): p.unlink()
    again = load_weights(Wav2Vec2.from_config(load_config(tmp_path/"model")["config"], TOKENIZER), tmp_path/"model").eval()
    assert again.frozen and again.config == model.config and again.rates() == model.rates()
    with torch.no_grad(): torch.testing.assert_close(again.encode(noise(9_000))[0], model.encode(noise(9_000))[0])


# Learning

def syllables(*pitches):
    return np.concatenate([np.sin(2 * np.pi * f * np.arange(6400) / SAMPLE_RATE) * np.hanning(6400) for f in pitches]).astype(np.float32)


def test_overfits_one_batch():
    batch = collate([syllables(200, 800), syllables(800, 2000, 200), syllables(2000)], ["a b", "b c a", "c"], ["a", "b", "c"])
    model = model_of(encoder=dict(num_hidden_layers=1)).train()
    optimizer = make_optimizer(model, "muon", 1e-2)
    for _ in range(220):
        loss = model(batch)
        optimizer.zero_grad(); loss.sum.backward(); torch.nn.utils.clip_grad_norm_(model.parameters(), 5.); optimizer.step()
    found = model.eval().transcribe(batch)
    assert [h.text for h in found] == batch.transcripts
    step = model.frame_samples/SAMPLE_RATE
    assert all(abs(t/step - round(t/step)) < 1e-6 and t < len(audio)/SAMPLE_RATE for h, audio in zip(found, batch.audio) for t in h.times)
    assert found[0].times == sorted(found[0].times) and 0.2 < found[0].times[-1] < 0.8


def test_infeasible_utterances_are_counted():
    "Ten letters do not fit into five frames."
    batch = collate([noise(2_000).audio[0].numpy(), noise(9_000).audio[0].numpy()], ["một hai ba", "một"], ["a", "b"])
    loss = model_of()(batch)
    assert (loss.units.item(), loss.counts["infeasible"].item(), loss.counts["utterances"].item()) == (1, 1, 2)
    loss.sum.backward()


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_frozen_convolutions_do_not_move(norm):
    model = model_of(freeze_features=True, encoder=dict(feat_extract_norm=norm, mask_time_prob=0.3, mask_time_length=2)).train()
    before = {n: p.clone() for n,p in model.named_parameters()}
    trainer = TrainerOptimized(model, make_optimizer(model, "muon", 1e-2), batch_size=None, accumulation_steps=1)
    for _ in range(3): assert trainer.train_step([noise(16_000, 9_000)])["ok"]
    moved = {n for n,p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if n not in moved} == {n for n in before if n.startswith("encoder.feature_extractor.")}


def test_masks_depend_on_the_trainers_seed_only():
    def weights_after(numpy_seed):
        np.random.seed(numpy_seed)
        masks = dict(mask_time_prob=0.3, mask_time_length=2, mask_feature_prob=0.1, mask_feature_length=2)
        model = model_of(encoder=dict(masks, hidden_dropout=0.1, layerdrop=0.1)).train()
        trainer = TrainerOptimized(model, make_optimizer(model, "adamw", 1e-3), batch_size=None, accumulation_steps=1, amp_dtype="fp32") # auto: timed
        for _ in range(2): trainer.train_step([noise(16_000, 9_000)])
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights_after(0), weights_after(1))


# Pre-training

@pytest.fixture(scope="module")
def tiny(): return Layout(tiny_workspace("shards"))


def settings(**values):
    return make(
        PretrainConfig, dict(batch_seconds=8, batch_size=4, lr=1e-2, warmup_steps=4, mask_time_length=4, threads=1) | values, "pretrain"
    )


@pytest.mark.slow
def test_pretraining_learns_and_the_codebook_stays_in_use(tiny):
    config = settings(steps=140)
    model, curve = pretrain(model_of(), unlabelled_loader(tiny, config), config, every=20)
    first, last = curve[0], curve[-1]
    assert last["contrastive"] < min(first["contrastive"], math.log(9)) - 0.05 and last["loss"] < first["loss"]
    assert last["perplexity"] > 16, f"of 32 codes: {curve}"


def test_pretraining_resumes_exactly(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("ai2text.training.trainer.pick_dtype", lambda *_: torch.float32) # a timed choice may differ between two runs
    config = settings(steps=6)
    class Stop:
        def on_step(self, trainer):
            if trainer.state.step == 3: trainer.stop = "SIGTERM"
    whole, _ = pretrain(model_of(), unlabelled_loader(tiny, config), config)
    with pytest.raises(KeyboardInterrupt): pretrain(model_of(), unlabelled_loader(tiny, config), config, tmp_path, [Stop()])
    parts, _ = pretrain(model_of(), unlabelled_loader(tiny, config), config, tmp_path)
    for (name, a), b in zip(whole.encoder.named_parameters(), parts.encoder.parameters()): assert torch.equal(a, b), name


def test_pretraining_starts_from_a_releases_quantizer(tmp_path):
    import transformers
    shape = {k: v for k,v in model_of().config["encoder"].items()}
    torch.manual_seed(3)
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**shape))
    theirs.save_pretrained(tmp_path)
    model = Wav2Vec2.start(dict(init=str(tmp_path), pretrain=dict(steps=1)), TOKENIZER)
    assert torch.equal(model.released["quantizer.codevectors"], theirs.quantizer.codevectors) and len(model.released) == 7
    assert not Wav2Vec2.start(dict(init=str(tmp_path)), TOKENIZER).released
    other = Wav2Vec2.start(dict(init=str(tmp_path), pretrain=dict(steps=1), encoder=dict(num_codevectors_per_group=8)), TOKENIZER)
    with pytest.raises(ConfigError, match="the release's quantizer has another shape"): pretrain(other, [], settings(steps=1))


# Errors

def refused(message, **params):
    with pytest.raises(ConfigError) as error: Wav2Vec2.start(params, TOKENIZER)
    assert message in str(error.value), error.value


def test_a_name_without_a_commit_is_refused():
    refused("revision: '' is no commit", init="facebook/wav2vec2-base")
    refused("revision: 'main' is no commit", init="facebook/wav2vec2-base", revision="main")


def test_the_error_of_missing_weights_has_the_download_command(tmp_path):
    code = f"""
from ai2text.core.params import ConfigError
from ai2text.models.wav2vec import find_release
try: find_release("facebook/wav2vec2-base", "{COMMIT}")
except ConfigError as e: print(e)"""
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"`hf download facebook/wav2vec2-base config.json {WEIGHTS} --revision {COMMIT}`" in done.stdout, done.stdout + done.stderr


def test_corrupt_and_unsupported_weights_are_named(tmp_path):
    released(tmp_path, "wav2vec2")
    init, weights, about = str(tmp_path), (tmp_path/WEIGHTS).read_bytes(), json.loads((tmp_path/"config.json").read_text())
    (tmp_path/WEIGHTS).write_bytes(weights[:1000])
    refused(f"{WEIGHTS}: cannot be read as wav2vec2", init=init)
    (tmp_path/WEIGHTS).write_bytes(weights)
    refused(f"{WEIGHTS}: cannot be read as wav2vec2", init=init, encoder=dict(hidden_size=64))
    tensors = load_file(tmp_path/WEIGHTS)
    tensors.pop("wav2vec2.encoder.layers.1.attention.q_proj.weight")
    save_file(tensors, tmp_path/WEIGHTS, dict(format="pt"))
    refused("1 tensors of the encoder are missing, such as encoder.layers.1.attention.q_proj.weight", init=init)
    (tmp_path/"config.json").write_text(json.dumps(about | dict(model_type="whisper")))
    refused("model_type: 'whisper' is no encoder of this family; it takes wav2vec2, hubert", init=init)
    (tmp_path/"config.json").write_text(json.dumps(about | dict(add_adapter=True)))
    refused("has adapters", init=init)


def test_pickled_weights_are_not_read(tmp_path):
    released(tmp_path, "hubert")
    (tmp_path/WEIGHTS).unlink()
    (tmp_path/"pytorch_model.bin").write_bytes(b"would run code")
    refused("pickled weights are not read", init=str(tmp_path))

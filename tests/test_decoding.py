"Decoding across modules: exactness of the search, language models, ARPA files, hotwords, word times, corrupt and malicious files."
import gzip
import itertools
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ai2text.decoding.alignment import align_tokens
from ai2text.decoding.beam_search import DEFAULTS, Decoder, save_weights, tune, tuned_weights, word_errors
from ai2text.core.files import read_json, sha256, write_json
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.models.ctc import BLANK_ID, ctc_loss, greedy
from ai2text.decoding.ngram_lm import UNKNOWN_WORD, build_lm, fit_lm, load_lm
from ai2text.data.loader import create_webdataset_loader
from ai2text.models.store import build_model
from ai2text.text.normalise import NORMALISER
from ai2text.text.tokenizer import CharTokenizer, train_tokenizer
from ai2text.testing.workspace import tiny_workspace

EVERYTHING = dict(beam=10**6, min_prob=0., margin=math.inf)
TEXTS = """tôi không biết anh ấy ở đâu|hôm nay trời mưa to lắm|anh ấy không biết hôm nay trời mưa|tôi ở nhà vì trời mưa to|anh ở đâu hôm nay|nhà tôi ở đây
ai biết anh ấy ở đâu|trời hôm nay không mưa|không ai ở nhà hôm nay|tôi biết nhà anh ấy""".replace("\n", "|").split("|")


def log_softmax(x): return x - np.logaddexp.reduce(x, -1, keepdims=True)


def spoken(tokenizer, text, seed, noise=1., confused=()):
    "Log probabilities of an uncertain model; `confused` has (symbol, confused with, by how much)."
    rng, path = np.random.default_rng(seed), []
    for i in tokenizer.encode(text): path += [i]*int(rng.integers(1, 3)) + [BLANK_ID]*int(rng.integers(1, 3))
    x = noise*rng.normal(size=(len(path), tokenizer.vocab_size)) + 9*np.eye(tokenizer.vocab_size)[path]
    for symbol, other, much in confused: x[:, tokenizer.symbols.index(other)] += much*(np.array(path) == tokenizer.symbols.index(symbol))
    return log_softmax(x)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A folder with a text, a language model of it, and two tokenizers' tokens.txt."
    home = tmp_path_factory.mktemp("decoding")
    (home/"text.txt").write_text("\n".join(TEXTS), "utf-8")
    build_lm([home/"text.txt"], home/"lm", order=3, processes=1, normaliser=NORMALISER)
    CharTokenizer().save(home/"char")
    train_tokenizer(TEXTS*3, "bpe", 110).save(home/"bpe")
    return home


# The search is exact

def by_brute_force(decoder, x):
    found = {}
    for path in itertools.product(range(x.shape[1]), repeat=len(x)):
        text = decoder.text([k for k, _ in groupby(path) if k != BLANK_ID])
        found[text] = np.logaddexp(found.get(text, -np.inf), sum(x[t, k] for t, k in enumerate(path)))
    return {text: p + (decoder.scorer.score(text) if decoder.scorer else 0.) for text, p in found.items()}


SMALL = fit_lm(["a ba", "a a", "ba a ab", "a ba a", "ab"], 3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(["▁a", "b", "▁", "a", "▁b", "ab", "▁ba"]), min_size=1, max_size=4, unique=True),
    st.integers(0, 4), st.booleans(), st.lists(st.sampled_from(["a", "ab", "a ba", "b a b", "bb"]), max_size=2)
)
def test_every_text_has_its_exact_score(seed, tokens, frames, with_lm, hotwords):
    decoder = Decoder(
        ["<blk>", *tokens], SMALL if with_lm else None, lm_weight=0.7, word_bonus=0.4, unknown=-1.5, hotwords=hotwords,
        boost=1.5,
        **EVERYTHING,
    )
    x = log_softmax(2*np.random.default_rng(seed).normal(size=(frames, len(tokens) + 1)))
    want, got = by_brute_force(decoder, x), {decoder.text(ids): score for score, ids in decoder.nbest(x)}
    assert set(got) == set(want)
    assert all(got[text] == pytest.approx(want[text], abs=1e-9) for text in want)


def test_text_with_one_tokenisation_scores_as_the_ctc_loss():
    "The sum over paths equals the training loss."
    x = log_softmax(2*np.random.default_rng(3).normal(size=(8, 4)))
    for score, tokens in Decoder(["<blk>", "a", "b", "c"], **EVERYTHING).nbest(x)[:20]:
        assert score == pytest.approx(-float(ctc_loss(torch.tensor(x)[None], torch.tensor([len(x)]), [tokens]).sum), abs=1e-4)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_greedy_equals_ctc_greedy(files, kind):
    tokenizer = CharTokenizer() if kind == "char" else train_tokenizer(TEXTS*3, "bpe", 110)
    decoder = Decoder(files/kind/"tokens.txt", beam=0)
    for seed, text in enumerate(TEXTS):
        x = spoken(tokenizer, text, seed, noise=3.)
        theirs, = greedy(torch.tensor(x)[None], torch.tensor([len(x)]), tokenizer)
        ours = decoder.decode(x)
        assert (ours.text, ours.tokens, ours.times) == (theirs.text, theirs.tokens, theirs.times)


# Language model

def test_language_model_corrects_similar_sounds(files):
    tokenizer = train_tokenizer(TEXTS*3, "bpe", 110)
    utterances = [spoken(tokenizer, t, i, noise=2.8) for i, t in enumerate(TEXTS)]
    errors = {name: word_errors(TEXTS, [h.text for h in d.decode_all(utterances)])[0] for name, d in
              dict(greedy=Decoder(tokenizer, beam=0), beam=Decoder(tokenizer), lm=Decoder(tokenizer, files/"lm")).items()}
    assert errors["lm"] < 0.8*min(errors["beam"], errors["greedy"])


def test_vocabulary_is_open(files):
    "A syllable outside the language model is recognised, at the cost of the penalty."
    tokenizer, lm = CharTokenizer(), load_lm(files/"lm")
    x = spoken(tokenizer, "hôm nay quých ở nhà", 1, noise=.3)
    assert "quých" not in lm.ids
    free, strict = Decoder(tokenizer, lm, unknown=0.).nbest(x)[0], Decoder(tokenizer, lm, unknown=-5.).nbest(x)[0]
    assert Decoder(tokenizer, lm).text(strict[1]) == "hôm nay quých ở nhà"
    assert free[0] - strict[0] == pytest.approx(5., abs=.01)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("một hai ba bốn năm".split()), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=30),
    st.integers(1, 4),
    st.sampled_from([(1,), (1, 2), (1, 1, 2), (2,)]),
)
def test_probabilities_sum_to_one(texts, order, min_count):
    lm = fit_lm(texts, order, min_count)
    for text in [*texts[:3], "hai mốt ba", "", "năm năm năm"]:
        state = lm.start()
        for word in text.split(): state, _ = lm.step(state, lm.ids.get(word, UNKNOWN_WORD))
        assert sum(math.exp(lm.step(state, w)[1]) for w in range(len(lm.words)) if w != 1) == pytest.approx(1, abs=1e-4)


def test_same_text_gives_the_same_files(files, tmp_path):
    build_lm([files/"text.txt"], tmp_path/"again", order=3, processes=2, normaliser=NORMALISER)
    for name in ("lm.safetensors", "words.txt", "lm.json"):
        assert (tmp_path / "again" / name).read_bytes() == (files / "lm" / name).read_bytes(), name


def test_pickle_in_a_language_model_is_not_executed(files, tmp_path):
    "A pickle in place of the arrays is refused without loading it."
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/"was here"), "w"))
    build_lm([files/"text.txt"], tmp_path/"lm", order=2, processes=1, normaliser=NORMALISER)
    (tmp_path/"lm/lm.safetensors").write_bytes(pickle.dumps(Evil()))
    about = read_json(tmp_path/"lm/lm.json")
    about["files"]["lm.safetensors"] = sha256(tmp_path/"lm/lm.safetensors")
    write_json(tmp_path/"lm/lm.json", about)
    with pytest.raises(ConfigError, match="cannot be read"): load_lm(tmp_path/"lm")
    assert not (tmp_path/"was here").exists()


def test_truncated_language_model_is_refused(files, tmp_path):
    build_lm([files/"text.txt"], tmp_path/"lm", processes=1, normaliser=NORMALISER)
    path = tmp_path/"lm/words.txt"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"words\.txt: its checksum differs from lm\.json; make it again"):
        Decoder(files / "char/tokens.txt", tmp_path / "lm")


def test_language_model_imports_no_training_code():
    "A client that only decodes does not import it."
    code = "import sys; from ai2text.decoding.ngram_lm import load_lm; print(*sorted({'torchaudio', 'webdataset', 'dvc', 'matplotlib', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_threads_share_a_decoder_without_state(files):
    tokenizer = CharTokenizer()
    decoder = Decoder(tokenizer, files/"lm", hotwords=["nhà lê"])
    utterances = [spoken(tokenizer, t, i, noise=2.5) for i, t in enumerate(TEXTS)]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(decoder.decode, utterances*2))
    assert together == decoder.decode_all(utterances)*2
    assert len(decoder.scorer.states) == 1 # no state of the searches is kept


# ARPA files

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans())
def test_arpa_model_scores_by_back_off(tmp_path_factory, seed, order, packed):
    "Against the definition of backing off, with n-grams in any order and some without their suffix."
    rng, words = np.random.default_rng(seed), ["<unk>", "<s>", "</s>", "một", "hai", "ba"]
    grams = {(w,): (-rng.uniform(.5, 2), rng.uniform(-1, .1)) for w in rng.permutation(words).tolist()}
    for n in range(2, order + 1):
        for context in [g for g in grams if len(g) == n - 1 and g[-1] != "</s>"]:
            for w in rng.choice(words[2:] + words[:1], 2, replace=False).tolist():
                grams[(*context, w)] = -rng.uniform(0.1, 2), rng.uniform(-1, 0.1) * (n < order)
    levels = [[g for g in grams if len(g) == n] for n in range(1, order + 1)]
    text = "\\data\\\n" + "".join(f"ngram {n}={len(level)}\n" for n, level in enumerate(levels, 1))
    for n, level in enumerate(levels, 1):
        rng.shuffle(level)
        text += f"\n\\{n}-grams:\n" + "".join(
            f"{grams[tuple(g)][0]:.9f}\t{' '.join(g)}" + (f"\t{grams[tuple(g)][1]:.9f}" if n < order else "") + "\n" for g in level
        )
    path = tmp_path_factory.mktemp("arpa")/"lm.arpa"
    path.write_bytes((gzip.compress if packed else bytes)((text + "\n\\end\\\n").encode()))
    def log_prob(word, context):
        if (*context, word) in grams: return grams[(*context, word)][0]
        return grams.get(context, (0, 0))[1] + log_prob(word, context[1:])
    lm = load_lm(path)
    lm.write_arpa(path.with_name("again.arpa"))
    for sentence in ("một hai ba", "ba ba ba một", "hai bốn một hai", ""):
        padded = ["<s>", *(w if w in words else "<unk>" for w in sentence.split()), "</s>"]
        want = math.log(10)*sum(log_prob(padded[i], tuple(padded[max(0, i - order + 1):i])) for i in range(1, len(padded)))
        for model in (lm, load_lm(path.with_name("again.arpa"))): assert model.score(sentence) == pytest.approx(want, abs=1e-4)


def test_arpa_file_decodes_like_its_original_model(files, tmp_path):
    tokenizer, ours = train_tokenizer(TEXTS*3, "bpe", 110), load_lm(files/"lm")
    ours.write_arpa(tmp_path/"lm.arpa.gz")
    with pytest.warns(UserWarning, match="does not give the normaliser of its text"): foreign = Decoder(tokenizer, tmp_path/"lm.arpa.gz")
    utterances = [spoken(tokenizer, t, i, noise=2.8) for i, t in enumerate(TEXTS)]
    assert [h.text for h in foreign.decode_all(utterances, processes=2)] == [
        h.text for h in Decoder(tokenizer, ours).decode_all(utterances)
    ]


def test_words_that_tokens_cannot_spell_make_no_tables(files, tmp_path):
    "A web-scale model has words in every script; each letter would be a column, and each word a path."
    lm = load_lm(files/"lm")
    words = [chr(0x4e00 + i) for i in range(len(lm.words) - 3)]
    with (tmp_path/"lm.arpa").open("w", encoding="utf-8") as f:
        f.write(f"\\data\\\nngram 1={len(lm.words) + len(words) - 1}\n\n\\1-grams:\n")
        f.writelines(f"-2 {w}\n" for w in (*lm.words, *words[1:]))
        f.write("\n\\end\\\n")
    big, small = Decoder(CharTokenizer().symbols, tmp_path/"lm.arpa"), Decoder(CharTokenizer().symbols, lm)
    assert big.tree.shape == small.tree.shape and len(big.lm.words) == len(lm.words) + len(words) - 1


# Hotwords

def test_each_hotword_may_have_its_own_score(files):
    scorer = Decoder(files/"char/tokens.txt", hotwords=["văn an :2", "bình", "an :.5"], boost=1.).scorer
    assert [scorer.score(t) for t in ("văn an", "an", "bình", "bình an", "văn an an")] == [4, .5, 1, 1.5, 4.5]


def test_hotwords_are_recognised_and_change_nothing_else(files):
    tokenizer = CharTokenizer()
    blurred = [("ở", "ợ", 10.2), ("ư", "u", 10.2)]
    texts = ["tôi ở nhà lê thở", "anh phư ấy ở đâu"]
    utterances = [spoken(tokenizer, t, i, noise=.4, confused=blurred) for i, t in enumerate(texts)]
    without, names = Decoder(tokenizer, files/"lm"), ["Thở", "Phư", "nguyễn văn an", "đặng thị bình", "trời nắng"]
    with_names = Decoder(tokenizer, files/"lm", hotwords=names, boost=5.)
    recognised = lambda decoder: [
        name for text in (decoder.decode(x).text for x in utterances) for name in ("thở", "phư") if name in text.split()
    ]
    assert (recognised(without), recognised(with_names)) == ([], ["thở", "phư"])
    others = [spoken(tokenizer, t, 100 + i, noise=1.5) for i, t in enumerate(TEXTS)]
    assert [with_names.decode(x).text for x in others] == [without.decode(x).text for x in others]


def test_a_hotword_of_several_words_counts_as_a_whole(files):
    decoder = Decoder(files/"char/tokens.txt", hotwords=["văn an"], boost=2.)
    assert [decoder.scorer.score(t) for t in ("văn", "an", "an văn", "văn an", "vănan", "văn văn an")] == [0, 0, 0, 4, 0, 4]


# Times

def test_word_times_match_the_frames(files):
    tokenizer = CharTokenizer()
    path = [BLANK_ID]*10
    starts = []
    for word in "hôm nay mưa".split():
        path += tokenizer.encode(" ")
        starts.append(len(path)*.04) # a space may come long before its word: the first letter counts
        for i in tokenizer.encode(word): path += [i, i, BLANK_ID]
        path += [BLANK_ID]*20
    x = log_softmax(12*np.eye(tokenizer.vocab_size)[path])
    for decoder in (Decoder(tokenizer, beam=0), Decoder(tokenizer, files/"lm")):
        words = decoder.words(decoder.decode(x), x)
        assert [w.word for w in words] == ["hôm", "nay", "mưa"]
        assert [w.start for w in words] == pytest.approx(starts, abs=.001)
        assert all(a < w.end < a + .04*14 for a, w in zip(starts, words)) and min(w.confidence for w in words) > .9


def test_too_few_frames_are_an_error(files):
    with pytest.raises(ValueError, match="1 frames are too few for 2 tokens"): align_tokens(np.zeros((1, 5)), [1, 2])


# With a model, and with weights

def test_decoder_equals_transcribe_of_a_model(files):
    layout = Layout(tiny_workspace("shards"))
    tokenizer = CharTokenizer()
    model = build_model(dict(family="conformer", size="tiny"), tokenizer).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, std=.2)
    batch = next(
        iter(
            create_webdataset_loader(layout.split_shards("dev"), 10, 0, index=layout.split_index("dev"), batch_seconds=30.0, shuffle=False)
        )
    )
    with torch.no_grad(): logits, frames = model.encode(*model.features(batch.audio, batch.lengths))
    log_probs = [x[:n].numpy() for x, n in zip(logits.log_softmax(-1), frames)]
    theirs, ours = model.transcribe(batch), Decoder(tokenizer, beam=0).decode_all(log_probs)
    assert [h.tokens for h in ours] == [h.tokens for h in theirs] and any(h.tokens for h in ours)


def test_tuned_weights_are_stored_with_the_language_model(files, tmp_path):
    tokenizer = CharTokenizer()
    build_lm([files/"text.txt"], tmp_path/"lm", processes=1, normaliser=NORMALISER)
    assert Decoder(tokenizer, tmp_path/"lm").weights == DEFAULTS and tuned_weights(tmp_path/"lm") == {}
    utterances = [spoken(tokenizer, t, i, noise=3.3) for i, t in enumerate(TEXTS[:5])]
    weights, tried = tune(
        lambda weights: [h.text for h in Decoder(tokenizer, tmp_path/"lm", beam=8, **weights).decode_all(utterances)], TEXTS[:5], rounds=1
    )
    assert min(r["wer"] for r in tried) == next(r["wer"] for r in tried if all(r[k] == v for k, v in weights.items())) <= tried[0]["wer"]
    assert len({tuple(r.values())[:3] for r in tried}) == len(tried)
    save_weights(tmp_path/"lm", weights, wer=1.)
    assert Decoder(tokenizer, tmp_path/"lm").weights == weights
    assert load_lm(tmp_path/"lm").order == 3

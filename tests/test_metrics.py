"Error rates against jiwer, and significance tests on simulated systems."
import random
import unicodedata
from collections import Counter

import jiwer
import numpy as np
import pytest

from ai2text.core.code import import_closure
from ai2text.evaluation.metrics import align, aligned, score, score_rows, utterance_rows
from ai2text.evaluation.scorecard import details, matched_pairs, paired_difference, segments, tone_confusions
from ai2text.text.syllables import FINALS, NUCLEI, ONSETS, TONES, VOWELS, place_tone
from ai2text.text.tones import ERROR_KINDS, missed, split_tone, strip_diacritics, strip_tones

from conftest import LIBRARY, STAGES


def syllable(rng)->str:
    "A random syllable of Vietnamese spelling."
    letters = rng.choice(["", *ONSETS]) + rng.choice(NUCLEI) + rng.choice(["", "", *FINALS])
    first = next(i for i, c in enumerate(letters) if c in VOWELS)
    return place_tone(letters[:first] + unicodedata.normalize("NFC", letters[first] + rng.choice(["", *TONES])) + letters[first+1:])


def pairs(count:int, seed:int, none:float=0.05)->tuple[list, list]:
    "References and hypotheses with errors of all kinds; some hypotheses are empty."
    rng = random.Random(seed)
    vocabulary = [syllable(rng) for _ in range(300)]
    references, hypotheses = [], []
    for _ in range(count):
        ref = rng.choices(vocabulary, k=rng.randint(1, 15))
        hyp = (
            []
            if rng.random() < none
            else [
                w
                for word in ref
                for w in {
                    0: [], 1: [rng.choice(vocabulary)], 2: [word, rng.choice(vocabulary)], 3: [strip_tones(word)],
                    4: [strip_diacritics(word)]
                }.get(rng.randrange(12), [word])
            ]
        )
        references.append(" ".join(ref)); hypotheses.append(" ".join(hyp))
    return references, hypotheses


def rows(references, hypotheses, speakers:int=10)->list:
    utterances = [
        dict(id=str(i), text=text, speaker=f"s{i % speakers}", duration=1.0 + i % 7, corpus="demo", dialect=None, snr_db=float(i % 50))
        for i, text in enumerate(references)
    ]
    return utterance_rows(utterances, {str(i): text for i, text in enumerate(hypotheses)}, keep=("corpus", "dialect", "snr_db"))


def test_rates_are_those_of_jiwer():
    "Words and letters, of 1,000 random pairs one by one and together."
    references, hypotheses = pairs(1000, 0)
    assert 20 < hypotheses.count("") < 100
    for ref, hyp in zip(references, hypotheses):
        found = score([ref], [hyp], samples=1)
        assert found.wer == pytest.approx(jiwer.wer(ref, hyp)) and found.cer == pytest.approx(jiwer.cer(ref, hyp)), (ref, hyp)
    found = score(references, hypotheses)
    assert found.wer == pytest.approx(jiwer.wer(references, hypotheses)) and found.cer == pytest.approx(jiwer.cer(references, hypotheses))
    words = jiwer.process_words(references, hypotheses)
    assert (found.hits, found.substitutions, found.deletions, found.insertions) == (
        words.hits, words.substitutions, words.deletions, words.insertions
    )
    assert score_rows(rows(references, hypotheses)).wer == found.wer


def test_alignment_is_rebuilt_from_rows():
    for row in rows(*pairs(300, 1)): assert aligned(row) == align(row["reference"], row["hypothesis"])


def test_each_substitution_has_one_kind():
    "Tone, letters or both; their sum is jiwer's substitutions."
    references, hypotheses = pairs(500, 2)
    scored = rows(references, hypotheses)
    for _, a, b in (pair for row in scored for pair in aligned(row) if pair[0] == "substitute"):
        (letters, tone), (letters_hyp, tone_hyp) = split_tone(a), split_tone(b)
        assert [
            kind
            for kind, is_it in dict(
                tone=letters == letters_hyp and tone != tone_hyp,
                letters=letters != letters_hyp and tone == tone_hyp,
                both=letters != letters_hyp and tone != tone_hyp,
            ).items()
            if is_it
        ] == [missed(a, b)]
    found, total = details(scored, Counter()), score_rows(scored)
    assert sum(found["syllables"][kind] for kind in ERROR_KINDS) == found["syllables"]["wrong"] == total.substitutions
    assert found["syllables"]["aligned"] == total.hits + total.substitutions
    assert min(found["syllables"][kind] for kind in ERROR_KINDS) > 20
    tones = tone_confusions(scored)
    assert tones.sum() - tones.trace() == found["syllables"]["tone"] + found["syllables"]["both"]
    assert found["no_diacritics"]["wer"] < found["no_tones"]["wer"] < total.wer


def test_groups_add_up_to_the_total():
    scored = rows(*pairs(300, 3))
    found, total = details(scored, Counter()), score_rows(scored)
    assert found["by_corpus"] == dict(demo=total.wer) and found["by_dialect"] == dict(unknown=total.wer)
    assert found["by_frequency"] == {"never": pytest.approx((total.substitutions + total.deletions)/total.words)}
    assert list(found["by_length"]) == ["1 to 2 s", "2 to 4 s", "4 to 8 s"] and len(found["by_snr"]) == 5
    assert found["speakers"]["count"] == 10 and found["speakers"]["best"] <= total.wer <= found["speakers"]["worst"]


def cut(a:str, b:str)->list:
    "Segments by another method: errors are marked on words and gaps, and cut between two adjacent words without errors."
    words = sum(s != "I" for s in a)
    errors = np.zeros((2*words + 1, 2), dtype=int)                # gap, word, gap, ..., gap
    for side, signs in enumerate((a, b)):
        place = 0
        for s in signs:
            if s == "I": errors[2*place, side] += 1
            else: errors[2*place + 1, side] += s != "="; place += 1
    clean = errors.sum(1) == 0
    walls = {w + 1 for w in range(1, 2*words - 1, 2) if clean[w] and clean[w+1] and clean[w+2]} # the gap between two clean words
    found, now = [], np.zeros(2, dtype=int)
    for place in range(2*words + 1):
        if place in walls:
            if now.any(): found.append(tuple(now.tolist()))
            now = np.zeros(2, dtype=int)
        now = now + errors[place]
    return found + ([tuple(now.tolist())] if now.any() else [])


def test_segments_agree_with_a_plain_search():
    rng = random.Random(4)
    for _ in range(2000):
        words = rng.randint(1, 12)
        a, b = (
            "".join("I" * (rng.random() < 0.08) + rng.choices("=SD", (80, 15, 5))[0] for _ in range(words)) + "I" * (rng.random() < 0.08)
            for _ in range(2)
        )
        assert segments(dict(alignment=a), dict(alignment=b)) == cut(a, b), (a, b)


def simulated(p:float, rng, count:int=300, hard=None)->list:
    "Rows of 10 words each by 12 speakers; a word is wrong with the probability p, times `hard` of its utterance."
    hard = np.ones(count) if hard is None else hard
    out = []
    for i in range(count):
        signs = "".join(np.where(rng.random(10) < p*hard[i], "S", "="))
        out.append(dict(id=i, speaker=f"s{i%12}", reference="w "*9 + "w", alignment=signs, errors=signs.count("S"), words=10))
    return out


def test_matched_pairs_by_hand():
    "Seven segments, differences 1, 1, 1, -1, 1, -1, 1: mean 3/7, variance (7 - 9/7)/6 = 20/21, z = (3/7)/sqrt(20/147) = 1.1619, p = 0.2453."
    signs = [("S===S", "====="), ("D===", "===I="), ("=S", "=="), ("==", "=I="), ("S=", "==")]
    a, b = ([dict(id=i, reference="w", alignment=pair[side]) for i, pair in enumerate(signs)] for side in (0, 1))
    assert [s for x, y in zip(a, b) for s in segments(x, y)] == [(1, 0), (1, 0), (1, 0), (0, 1), (1, 0), (0, 1), (1, 0)]
    found = matched_pairs(a, b)
    assert (found["segments"], found["errors_a"], found["errors_b"]) == (7, 5, 2)
    assert found["z"] == pytest.approx(1.1619, abs=1e-4) and found["p"] == pytest.approx(.2453, abs=1e-4)


def test_p_is_uniform_for_equal_systems():
    "Also when utterances are hard for both; a better system is significant."
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        hard = rng.choice([.3, 1., 2.5], 200)
        found.append(matched_pairs(simulated(.1, rng, 200, hard), simulated(.1, rng, 200, hard))["p"])
    largest_gap = max(abs(np.mean(np.array(found) <= x) - x) for x in np.linspace(0, 1, 101))
    assert largest_gap < 1.63/len(found)**.5             # Kolmogorov and Smirnov, at the level of 1%
    assert matched_pairs(simulated(.07, rng), simulated(.1, rng))["p"] < .01


def test_paired_bootstrap_covers_the_difference():
    "The interval contains 0 for equal systems in about 95 of 100 cases, and not for a clearly better one."
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        found = paired_difference(simulated(.1, rng, 240), simulated(.1, rng, 240), samples=300, seed=trial)
        covered += found["difference_low"] <= 0 <= found["difference_high"]
    assert 85 <= covered <= 99
    better = paired_difference(simulated(.05, rng), simulated(.1, rng))
    assert better["difference_high"] < 0 and better["a_better"] > .99 and (better["unit"], better["units"]) == ("speaker", 12)
    assert better["difference"] == pytest.approx(-.05, abs=.02)
    same = simulated(.1, rng)
    assert paired_difference(same, same[::-1]) | dict(unit="", units=0) == dict(
        difference=0.0, difference_low=0.0, difference_high=0.0, a_better=0.5, unit="", units=0, samples=10_000
    )


def test_paired_intervals_are_narrower():
    "The errors of both systems are correlated; a paired difference is significant where separate intervals overlap."
    rng = np.random.default_rng(2)
    hard = np.repeat(rng.choice([.2, 1., 3.], 25), 12)
    a, b = simulated(.10, rng, 300, hard), simulated(.13, rng, 300, hard)
    found, apart = paired_difference(a, b), [paired_difference(x, [r | dict(errors=0) for r in x]) for x in (a, b)]
    assert found["difference_high"] < 0
    assert found["difference_high"] - found["difference_low"] < sum(x["difference_high"] - x["difference_low"] for x in apart)


def test_training_does_not_import_evaluation_details():
    "So their edits change no fingerprint of a run."
    assert not {"evaluate", "scorecard", "tones", "variants"} & {path.stem for path in import_closure("training.run", "models.conformer")}


def test_scoring_does_not_import_inverse_text_normalisation():
    "Digits in only one of two compared texts would be counted as errors; only the service and transcribe write them."
    scoring = [f"{o.room}.{o.path.stem[3:]}" for o in LIBRARY if o.room in ("text", "corpora", "data", "models", "training", "evaluation")]
    stages = [o.path for o in STAGES if o.path.stem in ("prepare", "pseudo", "shards", "init", "train", "evaluate")]
    assert len(scoring) > 40 and len(stages) == 6
    assert "itn" not in {path.stem for path in import_closure(*scoring, *stages, without=())}

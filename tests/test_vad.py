"Voice activity on synthetic utterances joined with pauses, clean and in noise."
import numpy as np
import pytest

from ai2text.audio.vad import Endpointer, SpeechDetector, speech_segments
from ai2text.corpora.tts import Voice, speak

RATE = 16_000
UTTERANCES = [("xin chào các bạn", "vi+f3"), ("hôm nay trời đẹp quá", "vi-vn-x-south+m2"), ("chúng tôi đi học", "vi-vn-x-central+m1"),
              ("mời anh vào nhà uống nước", "vi+m6"), ("cảm ơn nhiều lắm", "vi-vn-x-south+f1")]
PAUSES = [0.8, 0.25, 1.2, 0.7]


@pytest.fixture(scope="module")
def recording():
    "The samples, and (first, last + 1) of each utterance."
    parts, spans, at = [np.zeros(RATE)], [], RATE
    for (text, voice), pause in zip(UTTERANCES, [*PAUSES, 1.5]):
        wave, _ = speak(text, Voice(*voice.split("+")))
        spans.append((at, at + len(wave)))
        parts += [0.3*wave/np.abs(wave).max(), np.zeros(round(pause*RATE))]
        at += len(wave) + round(pause*RATE)
    return np.concatenate(parts).astype(np.float32), spans


@pytest.mark.parametrize("snr", [None, 20])
def test_long_pauses_end_utterances_and_short_ones_do_not(recording, snr):
    wave, spans = recording
    if snr: wave = wave + (np.sqrt(np.mean(wave**2))*10**(-snr/20)*np.random.default_rng(0).standard_normal(len(wave))).astype(np.float32)
    ends = Endpointer(silence_after_words=0.4, before=0, after=0)
    found = ends(SpeechDetector()(wave)) + ends.finish(len(wave))
    wanted = [spans[0], (spans[1][0], spans[2][1]), *spans[3:]]  # the second pause is too short to end an utterance
    assert [s.reason for s in found] == ["silence"]*4
    for segment, (start, end) in zip(found, wanted, strict=True):
        assert abs(segment.start - start) < 0.15 * RATE and abs(segment.end - end) < 0.25 * RATE


def test_blocks_of_any_size_give_the_segments_of_the_file(recording):
    wave, _ = recording
    whole = list(speech_segments([wave], silence_after_words=0.4))
    for size in (320, 1600, 7777):
        parts = list(speech_segments((wave[at:at+size] for at in range(0, len(wave), size)), silence_after_words=0.4))
        assert [(s, len(w)) for s, w in parts] == [(s, len(w)) for s, w in whole]


def test_all_speech_of_a_long_monologue_is_in_segments(recording):
    wave, spans = recording
    speech = np.concatenate([wave[a:b] for a, b in spans]*8)
    found = list(speech_segments([np.concatenate([np.zeros(RATE, np.float32), speech, np.zeros(RATE, np.float32)])], longest=6.))
    assert len(found) > 8 and all(len(w) <= 6*RATE for _, w in found)
    assert abs(sum(len(w) for _, w in found) - len(speech)) < 0.8*RATE  # split without loss, with little silence added

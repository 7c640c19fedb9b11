"Corpora in the layouts of other tools: imported completely with speakers and splits, and unchanged through prepare and shards."
import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ai2text.audio.io import segment_args, read_audio
from ai2text.core.files import read_jsonl, sha256, write_jsonl
from ai2text.core.layout import Layout
from ai2text.core.params import ConfigError
from ai2text.core.sections import CorpusConfig, PrepareConfig, ShardsConfig
from ai2text.corpora.checks import SPLITS
from ai2text.corpora.corpus import IMPORTERS, make_corpus
from ai2text.corpora.prepare import prepare
from ai2text.data.loader import create_webdataset_loader
from ai2text.data.shards import verify, write_shards
from ai2text.testing.hub_server import serve_hub

RATE, GAP = 16_000, 4000 # Hz; samples of silence between the utterances of a long recording
DIGITS = "không một hai ba bốn năm sáu bảy tám chín".split()
SPEAKERS = dict(train="ann", dev="bob", test="eve")
PIN = "89abcdef01234567"*2 + "76543210"
numbers = itertools.count(1)


def utterances()->list[dict]:
    "Two of each speaker, unlike all others."
    found = []
    for split, speaker in SPEAKERS.items():
        for n in range(2):
            number = next(numbers)
            wave = np.round(8000*np.sin(np.arange(RATE + 160*number)*(0.02 + 0.003*number))).astype(np.int16)
            found.append(
                dict(
                    id=f"{speaker}_{n}", speaker=speaker, split=split,
                    text="số " + " ".join(DIGITS[int(d)] for d in f"{number:03}"), wave=wave
                )
            )
    return found


def put(path:Path, text:str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def wav(wave)->bytes:
    soundfile.write(f := io.BytesIO(), wave, RATE, format="WAV", subtype="PCM_16")
    return f.getvalue()


def save(folder:Path, utts, name="{split}/{speaker}/{id}.wav"):
    "Write a file for each utterance; sets `name`."
    for u in utts:
        u["name"] = name.format(**u)
        (folder/u["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder/u["name"]).write_bytes(wav(u["wave"]))


def save_long(folder:Path, utts, name="{split}/{speaker}.wav"):
    "Write a recording for each speaker; sets `name`, `start` and `end` (s) of each utterance."
    for mine in [[u for u in utts if u["speaker"] == speaker] for speaker in SPEAKERS.values()]:
        parts = []
        for u in mine:
            parts.append(np.zeros(GAP, np.int16))
            start = sum(map(len, parts))
            parts.append(u["wave"])
            u |= dict(name=name.format(**u), start=start/RATE, end=(start + len(u["wave"]))/RATE)
        (folder/mine[0]["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder/mine[0]["name"]).write_bytes(wav(np.concatenate([*parts, np.zeros(GAP, np.int16)])))


def tar(path:Path, members:dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as f:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            f.addfile(about, io.BytesIO(data))


def of(utts, split): return [u for u in utts if u["split"] == split]


# A layout writes utterances into a folder as its tool does; it returns the parameters, and the fields that it lacks

def dataset_dict(folder, utts):
    datasets = pytest.importorskip("datasets")
    made = lambda mine: datasets.Dataset.from_list(
        [
            dict(audio=dict(bytes=wav(u["wave"]), path=f"{u['id']}.wav"), id=7, transcription=u["text"], speaker_id=u["speaker"])
            for u in mine
        ]
    ).cast_column("audio", datasets.Audio())
    return datasets.DatasetDict({dict(dev="validation").get(split, split): made(of(utts, split)) for split in SPLITS})


def parquet(folder, utts):
    for split, data in dataset_dict(folder, utts).items(): data.to_parquet(folder/f"data/{split}-00000-of-00001.parquet")
    return dict(source="huggingface")


def saved_dataset(folder, utts):
    dataset_dict(folder, utts).save_to_disk(folder)
    return dict(source="huggingface")


def classes(folder, utts):
    "Speakers as class labels, stored as numbers."
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(
        [dict(audio=dict(bytes=wav(u["wave"]), path=None), said=u["text"], who=u["speaker"], split=u["split"]) for u in utts]
    ).cast_column("audio", datasets.Audio())
    data.class_encode_column("who").to_parquet(folder/"all.parquet")
    return dict(source="huggingface", columns=dict(text="said", speaker="who"))


def lhotse_sets(folder, utts):
    lhotse = pytest.importorskip("lhotse")
    save_long(folder, utts)
    for split in SPLITS:
        recordings = lhotse.RecordingSet.from_recordings(
            {u["name"]: lhotse.Recording.from_file(folder / u["name"]) for u in of(utts, split)}.values()
        )
        yield (
            split,
            recordings,
            lhotse.SupervisionSet.from_segments(
                lhotse.SupervisionSegment(
                    id=u["id"], recording_id=u["speaker"], start=u["start"], duration=u["end"] - u["start"],
                    text=u["text"], speaker=u["speaker"]
                )
                for u in of(utts, split)
            ),
        )


def lhotse_cuts(folder, utts):
    for split, recordings, supervisions in lhotse_sets(folder, utts):
        from lhotse import CutSet
        cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
        (cuts.trim_to_supervisions() if split == "dev" else cuts).to_file(folder/f"cuts_{split}.jsonl.gz")
    return dict(source="lhotse")


def lhotse_manifests(folder, utts):
    for split, recordings, supervisions in lhotse_sets(folder, utts):
        recordings.to_file(folder/f"talk_recordings_{split}.jsonl.gz")
        supervisions.to_file(folder/f"talk_supervisions_{split}.jsonl")
    return dict(source="lhotse")


def kaldi_by_lhotse(folder, utts):
    for split, recordings, supervisions in lhotse_sets(folder, utts):
        from lhotse.kaldi import export_to_kaldi
        export_to_kaldi(recordings, supervisions, folder/"data"/split)
    return dict(source="kaldi", transcripts="data")


def kaldi(folder, utts):
    save(folder, utts)
    for split in SPLITS:
        for name, key in dict(text="text", utt2spk="speaker", **{"wav.scp": "name"}).items():
            put(folder / f"data/{split}/{name}", "".join(f"{u['id']} {u[key]}\n" for u in of(utts, split)))
    return dict(source="kaldi", transcripts="data")


def nemo_offsets(folder, utts):
    save_long(folder, utts)
    for split in SPLITS:
        write_jsonl(
            folder / f"{split}_manifest.json",
            [
                dict(audio_filepath=u["name"], offset=u["start"], duration=str(u["end"] - u["start"]), text=u["text"], speaker=u["speaker"])
                for u in of(utts, split)
            ],
        )
    return dict(source="nemo")


def nemo_tarred(folder, utts):
    rows = [
        dict(
            audio_filepath=f"{u['id']}.wav", duration=len(u["wave"]) / RATE, text=u["text"], speaker=u["speaker"],
            split=u["split"], shard_id=n % 2
        )
        for n, u in enumerate(utts)
    ]
    write_jsonl(folder/"tarred_audio_manifest.json", rows)
    for shard in range(2): tar(folder/f"audio_{shard}.tar", {f"{u['id']}.wav": wav(u["wave"]) for u in utts[shard::2]})
    return dict(source="nemo")


def wenet(folder, utts):
    save_long(folder, utts)
    for split in SPLITS:
        write_jsonl(
            folder / split / "data.list",
            [
                dict(key=u["id"], wav=u["name"], txt=u["text"], start=u["start"], end=u["end"], speaker=u["speaker"])
                for u in of(utts, split)
            ],
        )
    return dict(source="wenet")


def wenet_shards(folder, utts):
    for split in SPLITS:
        tar(
            folder / f"shards/{split}_000.tar",
            {f"{u['id']}.{end}": data for u in of(utts, split) for end, data in (("txt", u["text"].encode()), ("wav", wav(u["wave"])))},
        )
        put(folder/split/"data.list", f"shards/{split}_000.tar\n")
    return dict(source="wenet"), "speaker"


def clock(seconds, mark):
    return f"{int(seconds) // 3600:02}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}{mark}{round(seconds % 1 * 1e6):06}"


def each_talk(folder, utts):
    save_long(folder, utts)
    for name, mine in itertools.groupby(utts, lambda u: u["name"]): yield folder/name, list(mine)


def srt(folder, utts):
    for path, mine in each_talk(folder, utts):
        put(
            path.with_suffix(".srt"),
            "\n".join(f"{n}\n{clock(u['start'], ',')} --> {clock(u['end'], ',')}\n<i>{u['text']}</i>\n" for n, u in enumerate(mine, 1)),
        )
    return dict(source="folder"), "speaker" # its folders are splits


def vtt(folder, utts):
    for path, mine in each_talk(folder, utts):
        put(
            path.with_suffix(".vi.vtt"),
            "WEBVTT\n\n"
            + "\n".join(f"{clock(u['start'], '.')} --> {clock(u['end'], '.')} line:0\n<v {u['speaker']}>{u['text']}\n" for u in mine),
        )
    return dict(source="folder")


def textgrid(folder, utts):
    for path, mine in each_talk(folder, utts):
        spans, at = [], 0.
        for u in mine: spans, at = [*spans, (at, u["start"], ""), (u["start"], u["end"], u["text"])], u["end"]
        tiers = "".join(
            f'"IntervalTier"\n"{name}"\n0\n{at}\n{len(spans)}\n' + "".join(f'{a}\n{b}\n"{text}"\n' for a, b, text in spans)
            for name in (mine[0]["speaker"], "words")
        )
        put(path.with_suffix(".TextGrid"), f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n{at}\n<exists>\n2\n{tiers}')
    return dict(source="folder")


def lab(folder, utts):
    for path, mine in each_talk(folder, utts):
        put(path.with_suffix(".lab"), "".join(f"{u['start']}\t{u['end']}\t{u['text']}\n" for u in mine))
    return dict(source="folder"), "speaker"


def fleurs(folder, utts):
    save(folder, utts, "audio/{split}/{id}.wav")
    for split in SPLITS:
        put(
            folder / f"{split}.tsv",
            "".join(
                f"17\t{u['id']}.wav\t{u['text'].capitalize()}.\t{u['text']}\t{' '.join(u['text'].replace(' ', '|'))} |\t{len(u['wave'])}\tFEMALE\n"
                for u in of(utts, split)
            ),
        )
    return dict(source="fleurs"), "speaker"


def kaldi_calls(folder, utts):
    "Two utterances in the channels of each recording; speakers in spk2utt; `eval` for test."
    for split, name in dict(train="train", dev="dev", test="eval").items():
        one, two = of(utts, split)
        size = max(len(one["wave"]), len(two["wave"]))
        both = np.stack([np.pad(u["wave"], (0, size - len(u["wave"]))) for u in (one, two)], 1)
        one["wave"], two["wave"] = both.T
        (folder/"calls").mkdir(exist_ok=True)
        (folder/f"calls/{split}.wav").write_bytes(wav(both))
        rows = dict(
            text=f"{one['id']} {one['text']}\n{two['id']} {two['text']}\n",
            spk2utt=f"{one['speaker']} {one['id']} {two['id']}\n",
            **{
                "wav.scp": f"{one['id']} calls/{split}.wav\n{two['id']} calls/{split}.wav\n",
                "reco2file_and_channel": f"{one['id']} {split} A\n{two['id']} {split} B\n",
            },
        )
        for file, text in rows.items(): put(folder/f"data/{name}/{file}", text)
    return dict(source="kaldi", transcripts="data")


def json_by_split(folder, utts):
    save(folder, utts, "wavs/{id}.wav")
    put(
        folder / "all.json",
        json.dumps(
            {
                name: [dict(Path=u["name"], Sentence=u["text"], spkID=u["speaker"]) for u in of(utts, split)]
                for split, name in dict(train="train", dev="validation", test="evaluation").items()
            }
        ),
    )
    return dict(source="json", transcripts="all.json")


def utf16_table(folder, utts):
    save(folder, utts, "Đợt 1/{id}.wav")
    text = "".join(f"D:\\thu âm\\{u['name']} ; {u['text']} ; {u['speaker']} ; {u['split']}\r\n".replace("/", "\\") for u in utts)
    (folder/"metadata.csv").write_bytes(("Path ; Sentence ; Speaker ; Split\r\n" + text).encode("utf-16"))
    return dict(source="csv")


def fosd(folder, utts):
    save(folder, utts, "{id}.mp3.wav")
    put(folder/"transcriptAll.txt", "\ufeff" + "".join(f"{u['name']}|{u['text']}|0.05-{len(u['wave'])/RATE:.2f}\n" for u in utts))
    return dict(source="fosd"), "speaker split"


def vits(folder, utts):
    save(folder, utts)
    for split, name in dict(train="train", dev="val", test="test").items():
        put(folder / f"filelists/vi_{name}_filelist.txt", "".join(f"{u['name']}|{u['speaker']}|{u['text']}\n" for u in of(utts, split)))
    return dict(source="vits")


def one_folder(folder, utts):
    save(folder, utts, "all/{id}.wav")
    for u in utts: put((folder/u["name"]).with_suffix(".txt"), u["text"])
    return dict(source="vlsp"), "speaker split"


def folder_a_split(folder, utts):
    save(folder, utts, "{split}/wavs/{id}.wav")
    for u in utts: put((folder/u["name"]).with_suffix(".txt"), u["text"])
    return dict(source="folder"), "speaker"


def splits_of_each_speaker(folder, utts):
    save(folder, utts, "corpus/{speaker}/{split}/{id}.WAV")
    for u in utts: put(folder/f"{u['name']}.txt", u["text"])
    return dict(source="folder")


def audio_folder(folder, utts):
    save(folder, utts, "{split}/{id}.wav")
    for split in SPLITS:
        put(
            folder / split / "metadata.csv",
            "file_name,transcription,speaker\n" + "".join(f"{u['id']}.wav,\"{u['text']}\",{u['speaker']}\n" for u in of(utts, split)),
        )
    return dict(source="csv")


def windows(folder, utts):
    save(folder, utts)
    put(
        folder / "metadata.tsv",
        "clip\tsaid\tsecs\twho\n"
        + "".join(f"{u['name']}\t{u['text']}\t{len(u['wave']) / RATE}\t{u['speaker']}\n".replace("/", "\\") for u in utts),
    )
    return dict(source="csv", columns=dict(audio="clip", text="said", speaker="who")) # splits from the folders in file names


def speechbrain(folder, utts):
    save_long(folder, utts)
    for split, name in dict(train="train", dev="valid", test="test").items():
        put(
            folder / f"{name}.csv",
            "ID,duration,wav,start,stop,spk_id,wrd\n"
            + "".join(
                f"{u['id']},1,$data_root/{u['name']},{round(u['start'] * RATE)},{round(u['end'] * RATE)},{u['speaker']},{u['text']}\n"
                for u in of(utts, split)
            ),
        )
    return dict(source="speechbrain")


def validated(folder, utts):
    save(folder, utts, "clips/{id}.wav")
    put(
        folder / "validated.tsv",
        "client_id\tpath\tsentence_id\tsentence\tup_votes\n" + "".join(f"{u['speaker']}\t{u['id']}.wav\t9\t{u['text']}\t2\n" for u in utts),
    )
    return dict(source="common_voice"), "split"


def vivos(folder, utts):
    for u in utts: u["split"] = u["split"].replace("dev", "train") # VIVOS has no dev
    save(folder, utts, "{split}/waves/{speaker}/{speaker}_{id}.wav")
    for split in ("train", "test"):
        put(folder / f"{split}/prompts.txt", "".join(f"{u['speaker']}_{u['id']} {u['text'].upper()}\n" for u in of(utts, split)))
    return dict(source="vivos")


def json_map(folder, utts):
    save(folder, utts, "wavs/{id}.wav")
    put(folder/"transcripts.json", json.dumps({u["id"]: u["text"] for u in utts}))
    return dict(source="json", transcripts="transcripts.json"), "speaker split"


def ljspeech(folder, utts):
    save(folder, utts, "wavs/{id}.wav")
    put(folder/"metadata.csv", "".join(f"{u['id']}|{u['text'].capitalize()}|{u['text']}\n" for u in utts))
    return dict(source="ljspeech"), "speaker split"


LAYOUTS = (
    vivos, json_map, ljspeech, parquet, saved_dataset, classes, lhotse_cuts, lhotse_manifests, kaldi_by_lhotse, kaldi,
    nemo_offsets, nemo_tarred, wenet, wenet_shards, srt, vtt, textgrid, lab, fleurs, fosd, vits, one_folder,
    folder_a_split, splits_of_each_speaker, kaldi_calls, json_by_split, utf16_table, audio_folder, windows, speechbrain,
    validated
)
each_layout = pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)


@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def imported(): return {} # corpus -> its utterances by text


@each_layout
def test_layout_is_imported_completely(root, imported, make):
    utts, name = utterances(), make.__name__
    (root/name).mkdir()
    made = make(root/name, utts)
    params, unknown = made if isinstance(made, tuple) else (made, "")
    assert make_corpus(CorpusConfig(path=name, processes=1, **params), name, Layout(root).corpus(name), root) == (len(utts), 0)
    rows = {row["text_raw"].lower().strip("."): row for row in read_jsonl(Layout(root).corpus_manifest(name))}
    assert len(rows) == len(utts)
    for u in utts:
        row = rows[u["text"]]
        for key in ("speaker", "split"): assert row[key] == ("" if key in unknown else u[key])
        path = Layout(root).corpus(name)/row["audio_filepath"]
        wave = read_audio(path, **segment_args(row))
        assert np.array_equal(wave*32768, u["wave"]) and row["sha256"] == sha256(path)
    imported[name] = utts


def test_layouts_pass_prepare_and_shards_unchanged(root, imported):
    "All imported corpora as one set; the shards have the recorded samples."
    layout, waves = Layout(root), {u["text"]: u["wave"] for utts in imported.values() for u in utts}
    if not waves: pytest.skip("nothing was imported")
    stats = prepare(PrepareConfig(tokenizer="char", processes=1), layout.corpora, layout.prepared)
    assert (
        stats["utterances"] == len(waves) == sum(row["utterances"] for row in stats["corpora"])
        and stats["rejected"] == 0
        and stats["caveats"] == []
    )
    decoded = {}
    for split in SPLITS:
        index = write_shards(
            read_jsonl(layout.manifest(split)), layout.split_shards(split), layout.split_index(split),
            ShardsConfig(shard_size=40, codec="wav", processes=1), audio_root=layout.prepared
        )
        assert index.rejected == [] and verify(layout.split_shards(split), index) == [] and index.seen == {}
        for batch in create_webdataset_loader(layout.split_shards(split), 8, 0, index=layout.split_index(split), shuffle=False):
            for text, wave, length in zip(batch.transcripts, batch.audio.numpy(), batch.lengths.tolist()): decoded[text] = wave[:length]
    assert decoded.keys() == waves.keys()
    assert [text for text, wave in waves.items() if not np.array_equal(np.round(decoded[text]*32768), wave)] == []
    # other corpora have dev and test
    assert [r for split in SPLITS for r in read_jsonl(layout.manifest(split)) if r["corpus"] == "validated" and r["split"] != "train"] == []


def test_every_source_has_a_layout_here():
    written = Path(__file__).read_text("utf-8")
    assert [source for source in IMPORTERS if source != "demo" and f'source="{source}"' not in written] == []


# The Hub

def test_hub_is_read_at_one_revision_and_resumed_after_broken_connections(tmp_path, monkeypatch):
    utts = utterances()
    parquet(tmp_path/"hub", utts)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    layout, url = Layout(tmp_path), f"hf://datasets/vi/talk@{PIN}"

    def made(path=url):
        return make_corpus(CorpusConfig(source="huggingface", path=path, processes=1), "hub", layout.corpus("hub"), tmp_path)

    with serve_hub(tmp_path/"hub", "vi/talk", PIN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.cuts = 10_000
        with pytest.raises(
            ConfigError,
            match=r"corpora.hub: hf://datasets/vi/talk@.*: cannot be read \(RemoteProtocolError.*nothing was kept; run the stage again",
        ):
            made()
        assert os.listdir(layout.corpora) == []
        hub.cuts = 3
        assert made() == (len(utts), 0) and hub.cuts == 0
        whole = {p.relative_to(tmp_path): sha256(p) for p in layout.corpus("hub").rglob("*") if p.is_file()}
        assert {sha256(wav(u["wave"])) for u in utts} <= set(whole.values())
        for wrong, message in {
            url.replace(PIN, "f" * 40): "no such dataset, revision or folder",
            url.replace(PIN, "main"): "main is not a commit",
            f"{url}/x": "no such dataset, revision or folder",
        }.items():
            with pytest.raises(ConfigError, match=message): made(wrong)
        assert {p.relative_to(tmp_path): sha256(p) for p in layout.corpora.rglob("*") if p.is_file()} == whole
        (tmp_path/"pin.txt").write_text(url)
        assert made("pin.txt") == (len(utts), 0)
        assert {p.relative_to(tmp_path): sha256(p) for p in layout.corpora.rglob("*") if p.is_file()} == whole
        assert all(f"/{PIN}" in path for _, path, _ in hub.requests if "/" + "f"*40 not in path)


# What is refused

def test_commands_in_a_list_are_rejected_and_not_run(tmp_path):
    utts = utterances()
    kaldi(tmp_path/"k", utts)
    put(tmp_path/"k/data/train/wav.scp", f"ann_0 touch {tmp_path}/run |\nann_1 train/ann/ann_1.wav\n")
    assert make_corpus(CorpusConfig(source="kaldi", path="k", transcripts="data", processes=1), "k", tmp_path/"out", tmp_path) == (5, 1)
    assert read_jsonl(tmp_path/"out/rejects.jsonl")[0]["reason"] == "command or archive" and not (tmp_path/"run").exists()


def test_invalid_segments_are_counted_with_reasons(tmp_path):
    utts = utterances()
    nemo_offsets(tmp_path/"n", utts)
    rows = read_jsonl(tmp_path/"n/train_manifest.json")
    bad = [
        dict(offset=99.0), dict(offset=0.5, duration=99.0), dict(offset="now"), dict(offset=0, duration=-1),
        dict(offset=None, duration="1.0")
    ]
    write_jsonl(tmp_path/"n/train_manifest.json", rows + [rows[0] | b | dict(text=f"hỏng {n}") for n, b in enumerate(bad)])
    assert make_corpus(CorpusConfig(source="nemo", path="n", processes=1), "n", tmp_path/"out", tmp_path) == (6, 5)
    assert [r["reason"] for r in sorted(read_jsonl(tmp_path / "out/rejects.jsonl"), key=lambda r: r["line"])] == [
        "outside of the recording", "outside of the recording", "no time", "no time", "piece of a recording"
    ]


# Overlap with train

def test_every_score_notes_overlap_with_train():
    from ai2text.core.files import read_json, write_json
    from ai2text.serving.model_card import _measured
    from ai2text.testing.workspace import tiny_model, tiny_workspace
    from ai2text.training.publish import summary
    layout = Layout(tiny_workspace())
    for split, seen in dict(dev=dict(speaker=1.0), test=dict(text=0.5)).items():
        write_json(layout.split_index(split), read_json(layout.split_index(split)) | dict(seen=seen))
    tiny_model("m", layout, "evaluate")
    assert read_json(layout.results("m")/"metrics.json")["seen"] == dict(speaker=1.)
    assert read_json(layout.results("m-eval")/"eval.json")["seen"] == dict(text=.5)
    (layout.root/"params.yaml").touch()
    text = summary(layout.root)
    for line in (
        "but the speakers of 100% of the utterances of dev are in train too",
        "but the texts of 50% of the utterances of test are in train too",
    ):
        assert line in text
    speech = dict(
        utterances=1, minutes=1.0, corpora=["c"], synthetic=[], training_hours=1.0, training_corpora=["c"],
        caveats=["the texts of 50% of them are known"]
    )
    assert "**The texts of 50% of them are known.**" in _measured(
        dict(wer=dict(full=dict(wer=0.1, wer_low=0.1, wer_high=0.1)), speech=speech, normaliser="n")
    )

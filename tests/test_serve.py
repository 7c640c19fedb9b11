"A service as a process: foreign clients, signals, floods, hangs, and what is kept on its way back to training."
import asyncio
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import soundfile as sf

from ai2text.core.batch import SAMPLE_RATE
from ai2text.core.files import read_jsonl
from ai2text.core.params import ConfigError
from ai2text.core.sections import CorpusConfig
from ai2text.corpora.corpus import make_corpus
from ai2text.decoding.itn import written
from ai2text.serving.bundle import seal
from ai2text.serving.latency import served
from ai2text.serving.server import FRAME_BYTES, MAX_AHEAD, running
from ai2text.serving.workers import MOST_MOVES
from ai2text.testing.raw_client import bearer, frames, metric, send, wait_for_metric
from ai2text.testing.toy_bundle import toy_bundle, whistle

TOKEN = "a token of the service's tests"


@pytest.fixture
def bundle(tmp_path): return toy_bundle(tmp_path/"bundle")


def of(service):
    "The process that hears the only stream of a service."
    (stream,) = service.streams
    return stream.speech.worker.process.pid


def test_foreign_client_works_as_it_is(bundle, tmp_path):
    "sherpa-onnx's own client, at 16 chunks as well: what it hears last is the whole text."
    sf.write(tmp_path/"talk.wav", whistle("hai một ba")[0], SAMPLE_RATE)
    client = Path(sys.executable).with_name("sherpa-onnx-online-websocket-client")
    async def main(folder):
        async with running(folder) as service:
            command = [client, "--server-ip=127.0.0.1", f"--server-port={service.url.rpartition(':')[2]}", "--seconds-per-message=0.2", str(tmp_path/"talk.wav")]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            out, _ = await asyncio.wait_for(process.communicate(), 30)
            return out.decode()
    for folder in (bundle, toy_bundle(tmp_path/"other", chunk=32, left_chunks=2)):
        out = asyncio.run(main(folder))
        assert "hai một ba" in out, out


def test_foreign_python_client(bundle):
    "As sherpa-onnx's examples in Python do it, with their library: samples in frames, Done, results until Done!."
    import websockets
    wave = whistle("sáu hai")[0]
    async def main():
        async with running(bundle, workers=1) as service, websockets.connect(service.websocket) as ws:
            async def receive():
                last = ""
                async for message in ws:
                    if message == "Done!": return last
                    last = json.loads(message)["text"]
            receiving = asyncio.create_task(receive())
            for at in range(0, len(wave), 3200): await ws.send(wave[at:at+3200].tobytes())
            await ws.send("Done")
            return await asyncio.wait_for(receiving, 30)
    assert asyncio.run(main()) == "sáu hai"


def test_the_last_chunk_is_heard(bundle):
    "Whatever the runtime is doing when a client says Done: the last result speaks for all of its audio."
    waves = [np.concatenate([np.zeros(641*i % 5120, np.float32), whistle("ba một")[0]]) for i in range(32)]
    async def main():
        async with running(bundle) as service: return await asyncio.gather(*(send(service, frames(w), pace=0.01) for w in waves))
    for wave, heard in zip(waves, asyncio.run(main()), strict=True):
        assert heard.text == "ba một" and abs(heard.results[-1]["decoded"] - len(wave)/SAMPLE_RATE) < 0.001


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_leave_nothing(bundle, number):
    "A service that is killed, and one that is asked to stop; its streams learn of the latter."
    async def main():
        with served(bundle, workers=2) as target:
            _, *below = target.pids()
            client = asyncio.create_task(send(target, frames(whistle("một")[0]), done=False))
            await wait_for_metric(target, "streams_open", 1)
            os.kill(target.pid, number)
            told = await client
            while any(Path(f"/proc/{p}").exists() for p in below): await asyncio.sleep(0.02)
        assert len(below) == 2
        assert told.code == 1006 if number == signal.SIGKILL else (told.code, told.reason, told.text) == (1012, "the service stops; connect again", "một")
    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_signal_is_obeyed_while_models_load(bundle):
    "A worker that does not come up stands for a large model: the service does not wait for it to end."
    process = subprocess.Popen([sys.executable, "-m", "ai2text.pipeline.cli", "serve", str(bundle), "--port", "0", "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while not (found := below.read_text().split()) or b"engine" not in Path(f"/proc/{found[0]}/cmdline").read_bytes(): pass # a moment later it would be ready
        os.kill(int(found[0]), signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=45) # less than `START_SECONDS`
    finally: process.kill()
    assert (process.returncode, out) == (0, b"") and not Path(f"/proc/{found[0]}").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_worker(bundle, count):
    "Ten streams of which some lose their worker in the middle of a word: nothing is lost of any, with another worker at hand or without."
    wave = np.concatenate([whistle("ba một")[0], np.zeros(SAMPLE_RATE*3, np.float32), whistle("hai sáu năm")[0]])
    async def main():
        async with running(bundle, workers=count) as service:
            old = service.workers.pids
            streams = [asyncio.create_task(send(service, frames(wave), pace=0.05)) for _ in range(10)]
            await wait_for_metric(service, "streams_open", 10)
            while min((s.received for s in service.streams), default=0) < len(wave) - SAMPLE_RATE: await asyncio.sleep(0.01)
            os.kill(old[0], signal.SIGKILL)
            heard = await asyncio.gather(*streams)
            assert {h.code for h in heard} == {1000} and {h.text for h in heard} == {"ba một hai sáu năm"}
            assert all(abs(h.results[-1]["decoded"] - len(wave)/SAMPLE_RATE) < 0.001 for h in heard)
            assert await wait_for_metric(service, "runtime_restarts", 1) < float("inf")
            while len(service.workers.pids) < count or Path(f"/proc/{old[0]}").exists(): await asyncio.sleep(0.02)
            assert old[0] not in service.workers.pids
            assert (await send(service, frames(wave))).text == "ba một hai sáu năm"
    asyncio.run(asyncio.wait_for(main(), 180))


def test_workers_that_die_together_count_once(bundle):
    "As when memory runs out: none of the dead is given the streams of another, which it might be blamed for."
    wave = np.concatenate([whistle("ba một hai sáu năm")[0]]*2)
    async def main():
        async with running(bundle, workers=MOST_MOVES + 2) as service:
            streams = [asyncio.create_task(send(service, frames(wave), pace=0.05)) for _ in range(10)]
            await wait_for_metric(service, "streams_open", 10)
            while min((s.received for s in service.streams), default=0) < SAMPLE_RATE: await asyncio.sleep(0.01)
            for pid in service.workers.pids: os.kill(pid, signal.SIGKILL)
            while service.workers.restarts < service.workers.count: await asyncio.sleep(0.01)
            moves = [s.speech.moves for s in service.streams]
            heard = await asyncio.gather(*streams)
            assert {h.code for h in heard} == {1000} and {h.text for h in heard} == {"ba một hai sáu năm ba một hai sáu năm"} and moves == [1]*10
    asyncio.run(asyncio.wait_for(main(), 180))


def test_stream_that_kills_workers_is_told(bundle):
    "After so many workers have died under it, and a good stream goes on."
    async def main():
        async with running(bundle, workers=2) as service:
            client = asyncio.create_task(send(service, frames(whistle("một")[0]), done=False))
            while not service.streams or not next(iter(service.streams)).received: await asyncio.sleep(0.02)
            (stream,) = service.streams
            while not client.done():
                if stream.speech.worker:
                    os.kill((worker := stream.speech.worker).process.pid, signal.SIGKILL)
                    while stream.speech.worker is worker and not client.done(): await asyncio.sleep(0.01)
                else: await asyncio.sleep(0.01)
            told = await client
            assert (told.code, told.reason) == (1012, "the recogniser was restarted; connect again") and stream.speech.moves == MOST_MOVES + 1
            await service.workers.ready.wait()
            assert (await send(service, frames(whistle("ba")[0]))).text == "ba"
    asyncio.run(asyncio.wait_for(main(), 120))


def test_whole_utterances(bundle):
    "The other kind of engine behind the same door: utterances found by their loudness, words with times, partial results that keep what they showed."
    first, second = whistle("một hai", seconds=0.4), whistle("ba sáu năm", seconds=0.4)
    pause = np.zeros(round(1.5*SAMPLE_RATE), np.float32)
    wave, later = np.concatenate([first[0], pause, second[0]]), (len(first[0]) + len(pause))/SAMPLE_RATE
    spans = first[1] + [[w, a + later, b + later] for w, a, b in second[1]]
    async def main():
        async with running(bundle, windowed=True, vad="loudness", every=0.1, silence_after_words=0.6) as service:
            assert "whole utterances" in service.about()
            live, fast = await asyncio.gather(send(service, frames(wave), pace=0.1), send(service, frames(wave)))
            for heard in (live, fast):
                finals = [r for r in heard.results if r["is_final"]]
                assert [r["text"] for r in finals] == ["một hai", "ba sáu năm"] and finals[-1]["is_eof"] and heard.code == 1000
                words = [w for r in finals for w in r["words"]]
                assert [w["word"] for w in words] == [w for w, *_ in spans]
                assert max(abs(w["start"] - a) + abs(w["end"] - b) for w, (_, a, b) in zip(words, spans, strict=True)) < 0.16
            partial = [r["text"].split() for r in live.results if not r["is_final"] and r["segment"] == 0]
            assert any(partial) and all(b[:len(a)] == a for a, b in zip(partial, partial[1:]))
    asyncio.run(asyncio.wait_for(main(), 60))


def test_phrases_of_a_request(bundle):
    async def main():
        async with running(bundle, workers=1) as service:
            there = type("There", (), dict(websocket=service.websocket + "?hotwords=ba%20một%20:1.5&hotwords=năm"))
            assert (await send(there, frames(whistle("ba một")[0]))).text == "ba một"
            for phrase, sign, says in (("☃", "☃", "cannot be said"), ("ba%20:0", ":0", "is no score"), ("ba%20%230.3", "#0.3", "threshold of a keyword spotter")):
                there.websocket = f"{service.websocket}?hotwords={phrase}"
                refused = await send(there, frames(whistle("ba")[0]))
                assert refused.code == 1008 and sign in refused.reason and says in refused.reason
    asyncio.run(main())


def test_vanishing_and_strange_clients(bundle):
    async def main():
        async with running(bundle, token=TOKEN) as service:
            async with aiohttp.ClientSession() as session:
                sockets = [await session.ws_connect(service.websocket, headers=bearer(service)) for _ in range(10)] # named, or Python would close them
                for ws in sockets: await ws.send_bytes(bytes(6400))
                assert await metric(service, "streams_open") == 10
            assert await wait_for_metric(service, "streams_open", 0) < float("inf")
            with pytest.raises(aiohttp.WSServerHandshakeError, match="401"): await send(service, [], headers={"Authorization": "Bearer somebody else's"})
    asyncio.run(main())


def test_lies_are_refused_beside_a_good_stream(bundle):
    wave, good = whistle("ba một")[0], next(frames(whistle("ba")[0]))
    lies = [(1007, random.Random(1).randbytes(4000)), (1007, (32767*np.sin(np.arange(1600))).astype("<f4").tobytes()), (1007, np.full(9, np.nan, "<f4").tobytes()), (1007, good[:-2]),
            (1003, '{"audio": [0.1]}'), (1009, bytes(FRAME_BYTES + 4))]
    async def main():
        async with running(bundle) as service:
            honest, *told = await asyncio.gather(send(service, frames(wave)), *(send(service, [good, lie], done=False) for _, lie in lies), send(service, [bytes(5*FRAME_BYTES)], done=False))
            assert [t.code for t in told[:-1]] == [code for code, _ in lies] and all(t.reason for t in told[:-1])
            assert told[-1].code in (1009, 1006) # the rest of a frame far too big is not even read: words may be lost with the connection
            assert honest.text == "ba một" and service.workers.restarts == 0
    asyncio.run(main())


@pytest.mark.slow
def test_back_pressure(bundle):
    "While the worker stands still, little is taken; when it goes on, all arrives. Five minutes are in memory at no time."
    wave, times = whistle("hai ba")[0], 120
    def pieces(worker):
        for i in range(times):
            if i == 5: os.kill(worker(), signal.SIGSTOP)
            yield from frames(wave, 8000)
    async def main():
        async with running(bundle, longest=1000., workers=1) as service: # one utterance: a cut could go through a word
            client = asyncio.create_task(send(service, pieces(lambda: of(service))))
            while not service.streams: await asyncio.sleep(0.05)
            (stream,) = service.streams
            pid = of(service)
            def waiting(): return (stream.received - stream.decoded)/SAMPLE_RATE
            taken = -1
            while not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" or stream.received != taken:
                taken = stream.received
                await asyncio.sleep(1) # in which nothing more is taken, once it stands still
            assert taken < 60*len(wave) and waiting() < MAX_AHEAD + 1 and not client.done()
            os.kill(pid, signal.SIGCONT)
            heard = await client
            assert heard.code == 1000 and abs(heard.results[-1]["decoded"] - times*len(wave)/SAMPLE_RATE) < 1
            assert heard.text.split().count("hai") == heard.text.split().count("ba") == times
        with served(bundle) as target:
            memory = []
            def minutes():
                for i in range(round(300*SAMPLE_RATE/len(wave))):
                    if i % 10 == 0: memory.append(sum(target.memory().values()))
                    yield from frames(wave, 8000)
            assert (await send(target, minutes())).code == 1000
            assert max(memory) < memory[len(memory)//10] + 30, memory # MB
    asyncio.run(asyncio.wait_for(main(), 600))


def test_hanging_worker_is_replaced(bundle):
    "One that stands still is found out, killed and replaced; its stream goes on."
    async def main():
        async with running(bundle, workers=1, patience=3.) as service:
            old = []
            def pieces():
                yield from frames(whistle("một")[0])
                old.append(of(service))
                os.kill(old[0], signal.SIGSTOP)
                yield from frames(whistle("ba")[0])
            heard = await asyncio.wait_for(send(service, pieces(), pace=0.05), 60)
            assert (heard.code, heard.text) == (1000, "một ba")
            while Path(f"/proc/{old[0]}").exists() or len(service.workers.pids) < len(service.workers.tasks): await asyncio.sleep(0.02)
            assert old[0] not in (new := service.workers.pids)
            await asyncio.sleep(4) # idle for longer than its patience: it is asked, and answers
            assert service.workers.pids == new and service.workers.restarts == 1
    asyncio.run(main())


def test_limits(bundle):
    async def main():
        async with running(bundle, seconds=1., idle=2.) as service:
            long = await send(service, frames(whistle("một hai ba")[0]))
            assert (long.code, long.reason) == (1008, "more than 1 s of audio; open a new stream")
            idle = await send(service, frames(whistle("một")[0]), done=False)
            assert (idle.code, idle.reason, idle.text) == (1008, "no audio for 2 s; send Done at the end", "một")
            nothing = await send(service, [])
            assert (nothing.code, nothing.text, len(nothing.results)) == (1000, "", 1)
            async with aiohttp.ClientSession() as session:
                for origin, status in (("https://elsewhere.vn", 403), (service.url, 101)):
                    headers = {"Origin": origin, "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
                    async with session.get(service.url, headers=headers) as answer: assert answer.status == status
            with pytest.raises(ConfigError, match="cannot listen there"):
                async with running(bundle, port=int(service.url.rpartition(":")[2])): pass
        with pytest.raises(ConfigError, match="without a token only this machine may be served"):
            async with running(bundle, host="0.0.0.0"): pass
    asyncio.run(main())


def test_pages_of_other_sites(bundle):
    "Those that are named may speak; others may not."
    async def main():
        async with running(bundle, workers=1, origins=["https://a.vn"]) as service, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"): await send(service, [], headers={"Origin": "https://b.vn"})
            assert (await send(service, frames(whistle("ba")[0]), headers={"Origin": "https://a.vn"})).text == "ba"
            async with session.get(service.url + "/v1/models", headers={"Origin": "https://a.vn"}) as answer: assert (answer.status, answer.headers["Access-Control-Allow-Origin"], (await answer.json())["data"][0]["id"]) == (200, "https://a.vn", "toy")
    asyncio.run(main())


@pytest.mark.parametrize("kind", ["chunk_ctc", "ctc", "whisper"])
def test_every_kind(tmp_path, kind):
    "The same protocol, the same words, a file through OpenAI's route, and a worker that is killed in the middle of an utterance."
    folder, wave = toy_bundle(tmp_path/kind, kind=kind), whistle("một hai ba", seconds=0.4)[0]
    async def main():
        async with running(folder, workers=1, vad="loudness", every=0.2) as service, aiohttp.ClientSession() as session:
            about = service.about()
            assert f"kind {kind}" in about and ("whole utterances" in about) == (kind != "chunk_ctc")
            heard = await send(service, frames(wave))
            assert (heard.code, heard.text, heard.results[-1]["is_eof"]) == (1000, "một hai ba", True) and len(heard.results[-1]["words"]) == 3
            form = aiohttp.FormData(dict(model="whisper-1"))
            sf.write(tmp_path/"talk.wav", wave, SAMPLE_RATE)
            form.add_field("file", (tmp_path/"talk.wav").read_bytes(), filename="talk.wav")
            async with session.post(service.url + "/v1/audio/transcriptions", data=form) as answer: assert (await answer.json())["text"] == written("một hai ba", sentence=True)
            def pieces():
                for n, piece in enumerate(frames(wave)):
                    if n == 8: os.kill(of(service), signal.SIGKILL)
                    yield piece
            again = await send(service, pieces(), pace=0.05)
            assert (again.code, again.text) == (1000, "một hai ba") and await wait_for_metric(service, "runtime_restarts", 1) < float("inf")
    asyncio.run(asyncio.wait_for(main(), 180))


def test_a_file_that_nobody_waits_for_is_read_no_further(tmp_path, monkeypatch):
    "Hours without a word are one step for a thread, which no cancelling ends: it must end itself, or the service does not stop."
    read, most = [], 4000
    def silence(path, notes):
        for _ in range(most): yield read.append(1) or np.zeros(SAMPLE_RATE, np.float32)
    monkeypatch.setattr("ai2text.serving.server.read_blocks", silence)
    async def main():
        async with running(toy_bundle(tmp_path/"bundle", kind="whisper"), workers=1) as service:
            going = asyncio.create_task(service.recognise("hours.flac"))
            while not read: await asyncio.sleep(0.01)
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
            service.readers.shutdown() # waits
    asyncio.run(main())
    assert 0 < len(read) < most


def test_a_bundle_put_in_the_place_of_another_is_not_taken_for_it(bundle, tmp_path):
    "Neither by a worker that starts again, nor for files, which are heard by a graph that is loaded late; and it is no fault of the client."
    lines, wave = [], whistle("ba một")[0]
    sf.write(tmp_path/"talk.wav", wave, SAMPLE_RATE)
    async def main():
        async with running(bundle, workers=1, log=lines.append) as service, aiohttp.ClientSession() as session:
            shutil.rmtree(bundle)
            toy_bundle(bundle, kind="ctc")
            form = aiohttp.FormData(dict(model="toy", file=(tmp_path/"talk.wav").open("rb")))
            async with session.post(f"{service.url}/v1/audio/transcriptions", data=form) as r: assert r.status == 500 and str(bundle) not in await r.text()
            assert (await send(service, frames(wave))).text == "ba một" # the worker has its model in memory
            os.kill(service.workers.pids[0], signal.SIGKILL)
            while not any("worker: " in line and "is not what it was" in line for line in lines): await asyncio.sleep(0.02)
            assert not service.workers.ready.is_set()
    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_a_client_that_leaves_has_said_is_kept(tmp_path):
    "Done is the last that the service hears of it; the result comes when nobody is there to read it."
    async def main():
        async with running(toy_bundle(tmp_path/"bundle", kind="ctc"), workers=1, keep=tmp_path/"kept", vad="loudness") as service:
            pid, = service.workers.pids
            os.kill(pid, signal.SIGSTOP)
            async with aiohttp.ClientSession() as session:
                client = await session.ws_connect(service.websocket)
                await client.send_bytes(whistle("ba một")[0].tobytes())
                await client.send_str("Done")
                while not (service.streams and next(iter(service.streams)).speech.over): await asyncio.sleep(0.01)
                client._response.connection.transport.abort()
                (stream,) = service.streams
                while stream.client._req.transport is not None and not stream.client._req.transport.is_closing(): await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGCONT)
            await wait_for_metric(service, "streams_open", 0)
        row, = [json.loads(p.read_text()) for p in (tmp_path/"kept").glob("*.json")]
        assert row["pred_text"] == "ba một" and (tmp_path/"kept"/row["audio_filepath"]).is_file()
    asyncio.run(asyncio.wait_for(main(), 60))


def test_unknown_kind_and_trained_on(bundle):
    "A bundle that no engine runs is refused in words; what the model was trained on is said to everybody."
    async def main():
        async with running(bundle, workers=1) as service, aiohttp.ClientSession() as session, session.get(service.url + "/health") as answer: return await answer.json()
    about = asyncio.run(main())
    assert (about["kind"], about["ready"]) == ("streaming_ctc", True) and "do not expect words" in about["trained"]
    config = json.loads((bundle/"config.json").read_text())
    (bundle/"config.json").write_text(json.dumps(config | dict(kind="oracle")))
    seal(bundle)
    with pytest.raises(ConfigError, match="oracle"): asyncio.run(main())


def test_tampered_bundle_and_wrong_settings(bundle, tmp_path):
    "No runtime is started for files that are not what they were."
    def run(*arguments, **environment):
        code = "import sys; from ai2text.pipeline.cli import arguments; from ai2text.serving.server import serve; import argparse; p = argparse.ArgumentParser(); arguments(p, serve, 'bundle'); serve(**vars(p.parse_args()))"
        done = subprocess.run([sys.executable, "-c", code, str(bundle), "--port", "0", *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60)
        return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1] if done.stderr else ""
    code, out, error = run("--help")
    assert code == 0 and "--token-file" in out and "--no-int8" in out and "folder for recordings" in out
    assert "token: 4 characters" in run(AI2TEXT_TOKEN="four")[2]
    assert "missing: cannot be read" in run("--token-file", str(tmp_path/"missing"))[2]
    assert run("--port", "70000")[2].endswith("--port 70000: give 1 to 65535, or 0 for any that is free")
    assert "README.md: no folder can be made there (File exists); name another" in run("--keep", str(bundle/"README.md"))[2]
    data = bytearray((bundle/"model.onnx").read_bytes())
    data[len(data)//2] ^= 1
    (bundle/"model.onnx").write_bytes(data)
    code, out, error = run()
    assert code and not out and re.search(r"model\.onnx: its content is not what SHA256SUMS says", error), error


def test_feedback_goes_back_to_training(bundle, tmp_path):
    "Stream, keep, correct, import: two segments, of which one is corrected, and their very samples."
    first, second = whistle("một hai")[0], whistle("ba")[0]
    rest = np.zeros(2*SAMPLE_RATE, np.float32)
    async def main():
        async with running(bundle, token=TOKEN, keep=str(tmp_path/"kept")) as service:
            heard = await send(service, frames(np.concatenate([first, rest, second])))
            ids = list(dict.fromkeys(r["id"] for r in heard.results if r["text"]))
            assert heard.text == "một hai ba" and len(ids) == 2
            assert await metric(service, 'segments_total{what="kept"}') == 2
            async with aiohttp.ClientSession() as session:
                mine = {"Authorization": f"Bearer {TOKEN}"}
                async def correct(headers, **body):
                    async with session.post(f"{service.url}/correct", json=body, headers=headers) as answer: return answer.status
                assert await correct({}, id=ids[0], text="a") == 401
                assert await correct(mine, id="../../etc/passwd", text="a") == 404
                assert await correct(mine, id=ids[0], text="") == 400
                assert await correct(mine, id=ids[0], text="một hải") == 200
                assert await correct(mine | {"Origin": "https://elsewhere.vn"}, id=ids[0], text="b") == 403
            return ids
    ids = asyncio.run(main())
    assert make_corpus(CorpusConfig(source="nemo", path=str(tmp_path/"kept"), processes=1), "feedback", tmp_path/"corpus") == (1, 1)
    (row,) = read_jsonl(tmp_path/"corpus/manifest.jsonl")
    assert (row["id"], row["text_raw"], row["split"]) == (f"feedback-{ids[0]}", "một hải", "train")
    sound, rate = sf.read(row["audio_filepath"], dtype="float32")
    assert rate == SAMPLE_RATE and len(first) < len(sound) < len(first) + 2*SAMPLE_RATE and np.abs(sound[:len(first)] - first).max() < 1e-4
    other = json.loads((tmp_path/f"kept/{ids[1]}.json").read_text())
    assert other["pred_text"] == "ba" and "text" not in other and 0 <= other["confidence"] <= 1
    shutil.rmtree(tmp_path/"kept")


def test_page_asks_nothing_from_elsewhere(bundle):
    async def main():
        async with running(bundle) as service, aiohttp.ClientSession() as session, session.get(service.url) as answer:
            return await answer.text(), answer.headers
    page, headers = asyncio.run(main())
    assert not re.search(r"(src|href|url|import|fetch|Worker)\s*[=(]\s*[\"'`]?\s*(https?:|//)", page)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self';" in policy and "frame-ancestors 'none'" in policy and policy.count("'sha256-") == 1
    assert FRAME_BYTES > 4*int(re.search(r"FRAME = (\d+)", page)[1])

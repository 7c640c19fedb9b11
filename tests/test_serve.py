"The service as a process: clients of others, signals, invalid and idle clients, dead workers, and saved recordings as a corpus."
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
from ai2text.decoding.beam_search import save_weights
from ai2text.decoding.itn import written
from ai2text.decoding.ngram_lm import build_lm
from ai2text.serving.bundle import seal
from ai2text.serving.latency import served
from ai2text.serving.server import FRAME_BYTES, MAX_AHEAD, running
from ai2text.serving.workers import MOST_MOVES
from ai2text.testing.raw_client import bearer, frames, metric, send, wait_for_metric
from ai2text.testing.toy_bundle import toy_bundle, whistle

TOKEN = "a token of the service's tests"


@pytest.fixture
def bundle(tmp_path): return toy_bundle(tmp_path/"bundle")


def worker_pid(service):
    "The worker process of a service's only stream."
    (stream,) = service.streams
    return stream.speech.worker.process.pid


def test_sherpa_client_gets_the_whole_text(bundle, tmp_path):
    "sherpa-onnx's own client, unchanged, with two chunk sizes."
    sf.write(tmp_path/"talk.wav", whistle("hai một ba")[0], SAMPLE_RATE)
    client = Path(sys.executable).with_name("sherpa-onnx-online-websocket-client")
    async def main(folder):
        async with running(folder) as service:
            command = [
                client, "--server-ip=127.0.0.1", f"--server-port={service.url.rpartition(':')[2]}",
                "--seconds-per-message=0.2", str(tmp_path / "talk.wav")
            ]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            out, _ = await asyncio.wait_for(process.communicate(), 30)
            return out.decode()
    for folder in (bundle, toy_bundle(tmp_path/"other", chunk=32, left_chunks=2)):
        out = asyncio.run(main(folder))
        assert "hai một ba" in out, out


def test_websockets_client_gets_the_whole_text(bundle):
    "As in sherpa-onnx's Python examples, with their library: samples in frames, Done, results until Done!."
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


def test_last_result_covers_all_audio(bundle):
    "For any length of the last chunk."
    waves = [np.concatenate([np.zeros(641*i % 5120, np.float32), whistle("ba một")[0]]) for i in range(32)]
    async def main():
        async with running(bundle) as service: return await asyncio.gather(*(send(service, frames(w), pace=0.01) for w in waves))
    for wave, client in zip(waves, asyncio.run(main()), strict=True):
        assert client.text == "ba một" and abs(client.results[-1]["decoded"] - len(wave)/SAMPLE_RATE) < 0.001


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signal_ends_all_processes(bundle, number):
    "SIGTERM also closes the streams with a reason."
    async def main():
        with served(bundle, workers=2) as target:
            _, *below = target.pids()
            task = asyncio.create_task(send(target, frames(whistle("một")[0]), done=False))
            await wait_for_metric(target, "streams_open", 1)
            os.kill(target.pid, number)
            client = await task
            while any(Path(f"/proc/{p}").exists() for p in below): await asyncio.sleep(0.02)
        assert len(below) == 2
        if number == signal.SIGKILL: assert client.code == 1006
        else: assert (client.code, client.reason, client.text) == (1012, "the service stops; connect again", "một")
    asyncio.run(asyncio.wait_for(main(), 120))


def test_signal_ends_a_service_whose_model_is_loading(bundle):
    "A stopped worker stands for a large model."
    command = [sys.executable, "-m", "ai2text.pipeline.cli", "serve", str(bundle), "--port", "0", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        # busy, or it would be ready
        while not (found := below.read_text().split()) or b"engine" not in Path(f"/proc/{found[0]}/cmdline").read_bytes(): pass
        os.kill(int(found[0]), signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=45) # less than `START_SECONDS`
    finally: process.kill()
    assert (process.returncode, out) == (0, b"") and not Path(f"/proc/{found[0]}").exists()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_worker_loses_no_word(bundle, count):
    "Ten streams of which some lose their worker in the middle of a word, with another worker or without."
    wave = np.concatenate([whistle("ba một")[0], np.zeros(SAMPLE_RATE*3, np.float32), whistle("hai sáu năm")[0]])
    async def main():
        async with running(bundle, workers=count) as service:
            old = service.workers.pids
            streams = [asyncio.create_task(send(service, frames(wave), pace=0.05)) for _ in range(10)]
            await wait_for_metric(service, "streams_open", 10)
            while min((s.received for s in service.streams), default=0) < len(wave) - SAMPLE_RATE: await asyncio.sleep(0.01)
            os.kill(old[0], signal.SIGKILL)
            received = await asyncio.gather(*streams)
            assert {h.code for h in received} == {1000} and {h.text for h in received} == {"ba một hai sáu năm"}
            assert all(abs(h.results[-1]["decoded"] - len(wave)/SAMPLE_RATE) < 0.001 for h in received)
            assert await wait_for_metric(service, "runtime_restarts", 1) < float("inf")
            while len(service.workers.pids) < count or Path(f"/proc/{old[0]}").exists(): await asyncio.sleep(0.02)
            assert old[0] not in service.workers.pids
            assert (await send(service, frames(wave))).text == "ba một hai sáu năm"
    asyncio.run(asyncio.wait_for(main(), 180))


def test_workers_killed_together_count_as_one_move(bundle):
    "As when memory runs out: no stream is moved to a worker that is dead too."
    wave = np.concatenate([whistle("ba một hai sáu năm")[0]]*2)
    async def main():
        async with running(bundle, workers=MOST_MOVES + 2) as service:
            streams = [asyncio.create_task(send(service, frames(wave), pace=0.05)) for _ in range(10)]
            await wait_for_metric(service, "streams_open", 10)
            while min((s.received for s in service.streams), default=0) < SAMPLE_RATE: await asyncio.sleep(0.01)
            for pid in service.workers.pids: os.kill(pid, signal.SIGKILL)
            while service.workers.restarts < service.workers.count: await asyncio.sleep(0.01)
            moves = [s.speech.moves for s in service.streams]
            received = await asyncio.gather(*streams)
            assert (
                {h.code for h in received} == {1000}
                and {h.text for h in received} == {"ba một hai sáu năm ba một hai sáu năm"}
                and moves == [1] * 10
            )

    asyncio.run(asyncio.wait_for(main(), 180))


def test_stream_that_kills_workers_is_closed(bundle):
    "After `MOST_MOVES` moves; another stream is not affected."
    async def main():
        async with running(bundle, workers=2) as service:
            task = asyncio.create_task(send(service, frames(whistle("một")[0]), done=False))
            while not service.streams or not next(iter(service.streams)).received: await asyncio.sleep(0.02)
            (stream,) = service.streams
            while not task.done():
                if stream.speech.worker:
                    os.kill((worker := stream.speech.worker).process.pid, signal.SIGKILL)
                    while stream.speech.worker is worker and not task.done(): await asyncio.sleep(0.01)
                else: await asyncio.sleep(0.01)
            client = await task
            assert (client.code, client.reason) == (
                1012,
                "the recogniser was restarted; connect again",
            ) and stream.speech.moves == MOST_MOVES + 1
            await service.workers.ready.wait()
            assert (await send(service, frames(whistle("ba")[0]))).text == "ba"
    asyncio.run(asyncio.wait_for(main(), 120))


def test_windowed_engine(tmp_path):
    "A full-context bundle: utterances found by loudness, word times, partial results whose words stay."
    bundle = toy_bundle(tmp_path/"bundle", kind="ctc")
    first, second = whistle("một hai", seconds=0.4), whistle("ba sáu năm", seconds=0.4)
    pause = np.zeros(round(1.5*SAMPLE_RATE), np.float32)
    wave, later = np.concatenate([first[0], pause, second[0]]), (len(first[0]) + len(pause))/SAMPLE_RATE
    spans = first[1] + [[w, a + later, b + later] for w, a, b in second[1]]
    async def main():
        async with running(bundle, vad="loudness", every=0.1, silence_after_words=0.6) as service:
            assert "full context" in service.about()
            live, fast = await asyncio.gather(send(service, frames(wave), pace=0.1), send(service, frames(wave)))
            for received in (live, fast):
                finals = [r for r in received.results if r["is_final"]]
                assert [r["text"] for r in finals] == ["một hai", "ba sáu năm"] and finals[-1]["is_eof"] and received.code == 1000
                words = [w for r in finals for w in r["words"]]
                assert [w["word"] for w in words] == [w for w, *_ in spans]
                assert max(abs(w["start"] - a) + abs(w["end"] - b) for w, (_, a, b) in zip(words, spans, strict=True)) < 0.16
            partial = [r["text"].split() for r in live.results if not r["is_final"] and r["segment"] == 0]
            assert any(partial) and all(b[:len(a)] == a for a, b in zip(partial, partial[1:]))
            decoded = await metric(service, "decoded_seconds_total")
            assert abs(decoded - 2*len(wave)/SAMPLE_RATE) < 0.01
            sf.write(tmp_path/"a.wav", first[0], SAMPLE_RATE)
            assert (await service.recognise(tmp_path/"a.wav")).lines == ["một hai"]
            assert await metric(service, "decoded_seconds_total") - decoded > 0.5*len(first[0])/SAMPLE_RATE
    asyncio.run(asyncio.wait_for(main(), 60))


def test_hotwords_of_a_request(bundle):
    async def main():
        async with running(bundle, workers=1) as service:
            there = type("There", (), dict(websocket=service.websocket + "?hotwords=ba%20một%20:1.5&hotwords=năm"))
            assert (await send(there, frames(whistle("ba một")[0]))).text == "ba một"
            for phrase, sign, reason in (
                ("☃", "☃", "tokens lack"),
                ("ba%20:0", ":0", "is not a score"),
                ("ba%20%230.3", "#0.3", "threshold of a keyword spotter"),
            ):
                there.websocket = f"{service.websocket}?hotwords={phrase}"
                refused = await send(there, frames(whistle("ba")[0]))
                assert refused.code == 1008 and sign in refused.reason and reason in refused.reason
    asyncio.run(main())


def test_final_results_use_the_language_model(bundle, tmp_path):
    "The recording is between two words: greedy decoding takes one, the language model has only the other."
    (tmp_path/"text").write_text("hai ba\nhai bốn sáu\n", encoding="utf-8")
    build_lm([tmp_path/"text"], tmp_path/"lm", order=2, processes=1, normaliser=str(bundle))
    save_weights(tmp_path/"lm", dict(lm_weight=1., word_bonus=0., unknown=-10.))
    between = 0.6*whistle("hai ba")[0] + 0.4*whistle("hai năm")[0]
    async def main(lm):
        async with running(bundle, workers=1, lm=lm) as service:
            return (await send(service, frames(between))).text, service.about()
    greedy, searched = asyncio.run(main("")), asyncio.run(main(str(tmp_path/"lm")))
    assert (greedy[0], searched[0]) == ("hai năm", "hai ba")
    assert f"lm        {tmp_path/'lm'}, for final results" in searched[1] and "  lm  " not in greedy[1]
    with pytest.raises(ConfigError, match="none/lm.json: no such file"): asyncio.run(main(str(tmp_path/"none")))


def test_two_passes(bundle):
    "The recording is between two words: the stream takes one, full context the other; times are those of the whole stream."
    pause = np.zeros(2*SAMPLE_RATE, np.float32)
    between = np.concatenate([whistle("hai")[0], pause, 0.6*whistle("hai ba")[0] + 0.4*whistle("hai năm")[0], pause, whistle("sáu")[0]])
    async def main(two_pass):
        async with running(bundle, workers=1, two_pass=two_pass) as service:
            assert f"kind streaming_ctc{', two passes'*two_pass}, a result each 0.32 s" in service.about()
            received = await send(service, frames(between))
            finals = [r for r in received.results if r["is_final"]]
            assert finals[-1]["is_eof"] and [r["segment"] for r in finals] == [0, 1, 2]
            return [r["text"] for r in finals], [w["start"] for r in finals for w in r["words"]]
    (one, starts), (two, again) = asyncio.run(main(False)), asyncio.run(main(True))
    assert (one, two) == (["hai", "hai năm", "sáu"], ["hai", "hai ba", "sáu"])
    assert max(abs(a - b) for a, b in zip(starts, again, strict=True)) < 0.16


def test_disconnected_and_unauthorised_clients(bundle):
    async def main():
        async with running(bundle, token=TOKEN) as service:
            async with aiohttp.ClientSession() as session:
                # referenced, or Python would close them
                sockets = [await session.ws_connect(service.websocket, headers=bearer(service)) for _ in range(10)]
                for ws in sockets: await ws.send_bytes(bytes(6400))
                assert await metric(service, "streams_open") == 10
            assert await wait_for_metric(service, "streams_open", 0) < float("inf")
            with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                await send(service, [], headers={"Authorization": "Bearer somebody else's"})

    asyncio.run(main())


def test_invalid_frames_are_refused_beside_a_valid_stream(bundle):
    wave, good = whistle("ba một")[0], next(frames(whistle("ba")[0]))
    invalid = [
        (1007, random.Random(1).randbytes(4000)), (1007, (32767 * np.sin(np.arange(1600))).astype("<f4").tobytes()),
        (1007, np.full(9, np.nan, "<f4").tobytes()), (1007, good[:-2]), (1003, '{"audio": [0.1]}'),
        (1009, bytes(FRAME_BYTES + 4))
    ]
    async def main():
        async with running(bundle) as service:
            refused = (send(service, [good, frame], done=False) for _, frame in invalid)
            valid, *clients, large = await asyncio.gather(
                send(service, frames(wave)), *refused, send(service, [bytes(5 * FRAME_BYTES)], done=False)
            )
            assert [c.code for c in clients] == [code for code, _ in invalid] and all(c.reason for c in clients)
            assert large.code in (1009, 1006) # its rest is not read, so the close frame may be lost with the connection
            assert valid.text == "ba một" and service.workers.restarts == 0
    asyncio.run(main())


@pytest.mark.slow
def test_back_pressure_bounds_memory(bundle):
    "While the worker is stopped, little is read; when it continues, everything arrives."
    wave, times = whistle("hai ba")[0], 120
    def pieces(worker):
        for i in range(times):
            if i == 5: os.kill(worker(), signal.SIGSTOP)
            yield from frames(wave, 8000)
    async def main():
        async with running(bundle, longest=1000., workers=1) as service: # one utterance, so that no word is split
            client = asyncio.create_task(send(service, pieces(lambda: worker_pid(service))))
            while not service.streams: await asyncio.sleep(0.05)
            (stream,) = service.streams
            pid = worker_pid(service)
            def waiting(): return (stream.received - stream.decoded)/SAMPLE_RATE
            taken = -1
            while not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T" or stream.received != taken:
                taken = stream.received
                await asyncio.sleep(1) # in which nothing more is read, once it is stopped
            assert taken < 60*len(wave) and waiting() < MAX_AHEAD + 1 and not client.done()
            os.kill(pid, signal.SIGCONT)
            received = await client
            assert received.code == 1000 and abs(received.results[-1]["decoded"] - times*len(wave)/SAMPLE_RATE) < 1
            assert received.text.split().count("hai") == received.text.split().count("ba") == times
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
    "A stopped worker is killed and replaced; its stream continues."
    async def main():
        async with running(bundle, workers=1, patience=3.) as service:
            old = []
            def pieces():
                yield from frames(whistle("một")[0])
                old.append(worker_pid(service))
                os.kill(old[0], signal.SIGSTOP)
                yield from frames(whistle("ba")[0])
            received = await asyncio.wait_for(send(service, pieces(), pace=0.05), 60)
            assert (received.code, received.text) == (1000, "một ba")
            while Path(f"/proc/{old[0]}").exists() or len(service.workers.pids) < len(service.workers.tasks): await asyncio.sleep(0.02)
            assert old[0] not in (new := service.workers.pids)
            await asyncio.sleep(4) # idle for longer than `patience`: it is pinged and answers
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
                    headers = {
                        "Origin": origin, "Connection": "Upgrade", "Upgrade": "websocket",
                        "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="
                    }
                    async with session.get(service.url, headers=headers) as answer: assert answer.status == status
            with pytest.raises(ConfigError, match="cannot listen there"):
                async with running(bundle, port=int(service.url.rpartition(":")[2])): pass
        with pytest.raises(ConfigError, match="without a token only this machine may be served"):
            async with running(bundle, host="0.0.0.0"): pass
    asyncio.run(main())


def test_pages_of_other_sites_need_an_allowed_origin(bundle):
    async def main():
        async with running(bundle, workers=1, origins=["https://a.vn"]) as service, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"): await send(service, [], headers={"Origin": "https://b.vn"})
            assert (await send(service, frames(whistle("ba")[0]), headers={"Origin": "https://a.vn"})).text == "ba"
            async with session.get(service.url + "/v1/models", headers={"Origin": "https://a.vn"}) as answer:
                assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://a.vn")
                assert (await answer.json())["data"][0]["id"] == "toy"
    asyncio.run(main())


@pytest.mark.parametrize("kind", ["chunk_ctc", "ctc", "whisper"])
def test_every_kind(tmp_path, kind):
    "The protocol, a file through OpenAI's route, and a worker killed in the middle of an utterance."
    folder, wave = toy_bundle(tmp_path/kind, kind=kind), whistle("một hai ba", seconds=0.4)[0]
    async def main():
        async with running(folder, workers=1, vad="loudness", every=0.2) as service, aiohttp.ClientSession() as session:
            about = service.about()
            assert f"kind {kind}" in about and ("full context" in about) == (kind != "chunk_ctc")
            received = await send(service, frames(wave))
            assert (received.code, received.text, received.results[-1]["is_eof"]) == (1000, "một hai ba", True)
            assert len(received.results[-1]["words"]) == 3
            form = aiohttp.FormData(dict(model="whisper-1"))
            sf.write(tmp_path/"talk.wav", wave, SAMPLE_RATE)
            form.add_field("file", (tmp_path/"talk.wav").read_bytes(), filename="talk.wav")
            async with session.post(service.url + "/v1/audio/transcriptions", data=form) as answer:
                assert (await answer.json())["text"] == written("một hai ba", sentence=True)

            def pieces():
                for n, piece in enumerate(frames(wave)):
                    if n == 8: os.kill(worker_pid(service), signal.SIGKILL)
                    yield piece
            again = await send(service, pieces(), pace=0.05)
            assert (again.code, again.text) == (1000, "một hai ba") and await wait_for_metric(service, "runtime_restarts", 1) < float("inf")
    asyncio.run(asyncio.wait_for(main(), 180))


def test_reading_a_file_stops_when_its_request_is_cancelled(tmp_path, monkeypatch):
    "The reader is a thread, which cannot be cancelled: it must end by itself, or the service does not stop."
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


def test_replaced_bundle_is_refused(bundle, tmp_path):
    "By a restarted worker, and for files, whose graph is loaded on first use; the client gets status 500."
    lines, wave = [], whistle("ba một")[0]
    sf.write(tmp_path/"talk.wav", wave, SAMPLE_RATE)
    async def main():
        async with running(bundle, workers=1, log=lines.append) as service, aiohttp.ClientSession() as session:
            shutil.rmtree(bundle)
            toy_bundle(bundle, kind="ctc")
            form = aiohttp.FormData(dict(model="toy", file=(tmp_path/"talk.wav").open("rb")))
            async with session.post(f"{service.url}/v1/audio/transcriptions", data=form) as r:
                assert r.status == 500 and str(bundle) not in await r.text()
            assert (await send(service, frames(wave))).text == "ba một" # the worker has its model in memory
            os.kill(service.workers.pids[0], signal.SIGKILL)
            while not any("worker: " in line and "is not what it was" in line for line in lines): await asyncio.sleep(0.02)
            assert not service.workers.ready.is_set()
    asyncio.run(asyncio.wait_for(main(), 60))


def test_recording_of_a_disconnected_client_is_saved(tmp_path):
    "The client leaves after Done, before its result."
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


def test_health_has_the_training_data_and_unknown_kinds_are_refused(bundle):
    async def main():
        async with (
            running(bundle, workers=1) as service,
            aiohttp.ClientSession() as session,
            session.get(service.url + "/health") as answer,
        ):
            return await answer.json()

    about = asyncio.run(main())
    assert (about["kind"], about["ready"]) == ("streaming_ctc", True) and "do not expect words" in about["trained"]
    config = json.loads((bundle/"config.json").read_text())
    (bundle/"config.json").write_text(json.dumps(config | dict(kind="oracle")))
    seal(bundle)
    with pytest.raises(ConfigError, match="oracle"): asyncio.run(main())


def test_corrupt_bundle_and_wrong_settings_are_errors_at_start(bundle, tmp_path):
    def run(*arguments, **environment):
        code = "import argparse; from ai2text.pipeline.cli import arguments; from ai2text.serving.server import serve; " \
            "p = argparse.ArgumentParser(); arguments(p, serve, 'bundle'); serve(**vars(p.parse_args()))"
        command = [sys.executable, "-c", code, str(bundle), "--port", "0", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)
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
    assert code and not out and re.search(r"model\.onnx: its content does not match SHA256SUMS", error), error


def test_corrected_recordings_are_imported_as_a_corpus(bundle, tmp_path):
    "Stream, save, correct, import: two segments, of which one is corrected, with their samples."
    first, second = whistle("một hai")[0], whistle("ba")[0]
    rest = np.zeros(2*SAMPLE_RATE, np.float32)
    async def main():
        async with running(bundle, token=TOKEN, keep=str(tmp_path/"kept")) as service:
            received = await send(service, frames(np.concatenate([first, rest, second])))
            ids = list(dict.fromkeys(r["id"] for r in received.results if r["text"]))
            assert received.text == "một hai ba" and len(ids) == 2
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


def test_page_loads_nothing_from_other_hosts(bundle):
    async def main():
        async with running(bundle) as service, aiohttp.ClientSession() as session, session.get(service.url) as answer:
            return await answer.text(), answer.headers
    page, headers = asyncio.run(main())
    assert not re.search(r"(src|href|url|import|fetch|Worker)\s*[=(]\s*[\"'`]?\s*(https?:|//)", page)
    policy = headers["Content-Security-Policy"]
    assert (
        "default-src 'none'" in policy
        and "connect-src 'self';" in policy
        and "frame-ancestors 'none'" in policy
        and policy.count("'sha256-") == 1
    )
    assert FRAME_BYTES > 4*int(re.search(r"FRAME = (\d+)", page)[1])

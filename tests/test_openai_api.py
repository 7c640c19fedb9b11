"OpenAI's routes, used by its package and by curl, on a server with worker processes; and their errors."
import asyncio
import contextlib
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import openai
import pytest
import soundfile as sf
from aiohttp import web

from ai2text.audio.decoders import AudioError
from ai2text.audio.io import Recording, read_blocks
from ai2text.audio.segment import split_at_silence
from ai2text.decoding.itn import for_readers, written
from ai2text.decoding.transcript import FORMATS, Transcript
from ai2text.protocols.transcriptions import add_routes
from ai2text.serving.client import _recognise_item, _start, recognise
from ai2text.serving.recogniser import Recogniser
from ai2text.testing.recordings import of_kind
from ai2text.testing.toy_bundle import WORDS, toy_bundle, whistle

RATE, TOKEN = 16_000, "0123456789abcdef"
MOST, LONGEST = 8 << 20, 1200.  # bytes of a file and seconds of a recording, at most


class Files:
    "A service for files: segments in worker processes, results in order."
    models = {"toy": 1_700_000_000}

    def __init__(self, bundle):
        self.pool, self.running, self.cancelled, self.delay = (
            ProcessPoolExecutor(2, initializer=_start, initargs=(Recogniser(bundle),)), 0, 0, 0.0
        )

    def first_and_rest(self, path):
        with Recording(path) as r:
            if r.seconds > LONGEST: raise AudioError(str(path), f"longer than {LONGEST/60:g} minutes, which is the most", "too long")
        return split_at_silence(read_blocks(path))

    async def recognise(self, path, language="vi", prompt="", on_text=None):
        loop, found, coming = asyncio.get_running_loop(), Transcript(path.name), await asyncio.to_thread(self.first_and_rest, path)
        self.running += 1
        try:
            while (piece := await asyncio.to_thread(next, coming, None)) is not None:
                await asyncio.sleep(self.delay)
                text, words = (await loop.run_in_executor(self.pool, _recognise_item, (0, piece[0], piece[1], None)))[3]
                found.duration += len(piece[1])/RATE
                found.lines.append(text)
                found.words += words
                if on_text: on_text(text)
        except asyncio.CancelledError: self.cancelled += 1; raise
        finally: self.running -= 1
        return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory): return toy_bundle(tmp_path_factory.mktemp("toy")/"bundle")


@pytest.fixture(scope="module")
def server(toy, tmp_path_factory):
    "The routes on 127.0.0.1, in a thread with a loop of its own."
    uploads, ready, log = tmp_path_factory.mktemp("uploads"), threading.Event(), []
    here = SimpleNamespace(service=Files(toy), uploads=uploads, log=log, token=TOKEN)
    async def main():
        here.loop, here.stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 16)
        here.routes = add_routes(app, here.service, token=TOKEN, folder=uploads, most=MOST, log=log.append, stall=5.)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        here.port = runner.addresses[0][1]
        here.url = f"http://127.0.0.1:{here.port}/v1"
        ready.set()
        await here.stop.wait()
        await runner.cleanup()
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(30)
    yield here
    here.loop.call_soon_threadsafe(here.stop.set)
    thread.join(30)
    here.service.pool.shutdown()
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    "After each test no upload and no work is left."
    yield
    if "server" not in request.fixturenames: return
    here = request.getfixturevalue("server")
    here.service.delay = 0.
    until(lambda: not os.listdir(here.uploads) and not here.service.running and not here.routes.open_requests)


def until(true, limit=60):
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    "A minute of tones with pauses, as FLAC."
    rng, waves = np.random.default_rng(0), []
    for _ in range(15):
        waves += [whistle(" ".join(rng.choice(list(WORDS), 6)), pause=0.12)[0], np.zeros(round(rng.uniform(0.3, 1.5) * RATE), np.float32)]
    path = tmp_path_factory.mktemp("talk")/"talk.flac"
    sf.write(path, np.concatenate(waves), RATE)
    return path


@pytest.fixture
def client(server): return openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=120)


def silent_film():
    "An MP4 with video and no audio."
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as box:
        stream = box.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(5): box.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        box.mux(stream.encode())
    return file.getvalue()


# OpenAI's package

def test_every_response_format_has_the_transcript(client, toy, talk):
    (found, error), = recognise(Recogniser(toy), [talk], processes=1)
    wanted = for_readers(found)
    assert not error and len(found.words) == 90 and len(wanted.lines) > 2
    ask = lambda **how: client.audio.transcriptions.create(model="whisper-1", file=talk, **how)
    assert ask().text == wanted.text
    assert ask(language="vi", temperature=0.2, prompt="một hai").text == wanted.text
    assert ask(response_format="text") == wanted.text + "\n"
    for form in ("srt", "vtt"): assert ask(response_format=form) == FORMATS[form](wanted)
    found = ask(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert (found.text, found.language, round(found.duration, 2)) == (wanted.text, "vietnamese", round(wanted.duration, 2))
    assert [(w.word, w.start, w.end) for w in found.words] == [(w.word, round(w.start, 3), round(w.end, 3)) for w in wanted.words]
    assert " ".join(s.text for s in found.segments) == " ".join(w.word for w in wanted.words)
    assert all(a.end <= b.start for a, b in zip(found.segments, found.segments[1:]))
    assert (
        ask(response_format="verbose_json").words is None
        and ask(response_format="verbose_json", timestamp_granularities=["word"]).segments is None
    )


def test_text_streams_while_the_rest_is_recognised(server, client, talk):
    server.service.delay = 0.2
    events, came = [], []
    for event in client.audio.transcriptions.create(model="toy", file=talk, stream=True):
        events.append(event)
        came.append(server.service.running)
    *deltas, done = events
    assert [e.type for e in deltas] == ["transcript.text.delta"]*len(deltas) and done.type == "transcript.text.done" and len(deltas) > 2
    assert "".join(e.delta for e in deltas) == done.text == client.audio.transcriptions.create(model="toy", file=talk).text
    assert came[0] == 1  # the first text arrived before the last segment was recognised


@pytest.mark.parametrize("name", ["iphone.m4a", "browser.webm", "telegram.oga", "meeting.mp4", "a.mp3", "a.wav"])
def test_containers(client, name):
    wave = whistle("một ba hai")[0]
    data = of_kind(name, wave, **dict(picture=True) if name == "meeting.mp4" else {}) if not name.startswith("a.") else None
    if data is None: sf.write(file := io.BytesIO(), np.stack([wave]*2, 1), RATE, format=name[2:].upper()); data = file.getvalue()
    for called in (name, "blob"):
        assert client.audio.transcriptions.create(model="toy", file=(called, data)).text == written("một ba hai", sentence=True)


def test_models(client):
    assert [(m.id, m.object, m.created) for m in client.models.list()] == [("toy", "model", 1_700_000_000)]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="gpt-4o-transcribe.*is not served here; there is toy"):
        client.models.retrieve("gpt-4o-transcribe")


def test_concurrent_requests_get_their_own_text(server):
    texts = [" ".join(np.random.default_rng(n).choice(list(WORDS), 4)) for n in range(10)]
    async def main():
        client = openai.AsyncOpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=120)
        async def one(text):
            sf.write(file := io.BytesIO(), whistle(text)[0], RATE, format="WAV")
            return (await client.audio.transcriptions.create(model="toy", file=("a.wav", file.getvalue()))).text
        return await asyncio.gather(*map(one, texts))
    assert asyncio.run(main()) == [written(text, sentence=True) for text in texts]


BAD = {
    "text": (b"this is no audio at all", 400, "invalid_audio", "not readable as audio \\(it is text"),
    "noise": (bytes(range(256))*40, 400, "invalid_audio", "not readable as audio"),
    "a film without sound": (silent_film, 400, "invalid_audio", "has no sound track"),
    "cut off": (lambda: of_kind("iphone.m4a", whistle("một "*9)[0])[:-3000], 400, "invalid_audio", "no index|breaks off"),
    "empty": (b"", 400, "invalid_value", "is empty"),
    "too large": (bytes(MOST + 1), 413, "file_too_large", "larger than 8 MiB"),
    "far too large": (bytes(4*MOST), 413, "file_too_large", "larger than 8 MiB"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_file_has_a_status_and_code(client, kind, stream):
    data, status, code, message = BAD[kind]
    with pytest.raises(openai.APIStatusError, match=message) as e:
        found = client.audio.transcriptions.create(model="toy", file=("recording.m4a", data() if callable(data) else data), stream=stream)
        if stream: list(found)
    assert (e.value.status_code, e.value.code) == (status, code)
    assert "/" not in e.value.body["message"].replace("multipart/form-data", "")  # no path of the server


def test_long_recording_is_refused_before_recognition(client, tmp_path):
    with sf.SoundFile(tmp_path/"long.flac", "w", 8000, 1, "PCM_16") as file:
        for _ in range(21): file.write(np.zeros(60*8000, np.int16))
    with pytest.raises(openai.APIStatusError, match="longer than 20 minutes") as e:
        client.audio.transcriptions.create(model="toy", file=tmp_path / "long.flac")
    assert (e.value.status_code, e.value.code) == (413, "audio_too_long")


@pytest.mark.parametrize(
    "how, kind, code, message",
    [
        (dict(response_format="docx"), openai.BadRequestError, "invalid_value", "response_format 'docx': choose from json"),
        (dict(language="en"), openai.BadRequestError, "unsupported_language", "language 'en': the model understands Vietnamese"),
        (dict(model="whisper-large-v3"), openai.NotFoundError, "model_not_found", "give one of toy, whisper-1"),
        (dict(temperature=3), openai.BadRequestError, "invalid_value", "temperature '3'"),
        (
            dict(response_format="verbose_json", timestamp_granularities=["letter"]), openai.BadRequestError,
            "invalid_value", "choose from segment, word"
        ),
        (dict(response_format="srt", stream=True), openai.BadRequestError, "invalid_value", "stream: gives text alone"),
    ],
)
def test_wrong_field_is_named(client, talk, how, kind, code, message):
    with pytest.raises(kind, match=re.escape(message)) as e: client.audio.transcriptions.create(**dict(model="toy", file=talk) | how)
    assert e.value.code == code


def test_wrong_key_is_refused(server, talk):
    with pytest.raises(openai.AuthenticationError, match="Bearer TOKEN"):
        openai.OpenAI(base_url=server.url, api_key="sk-wrong", max_retries=0).audio.transcriptions.create(model="toy", file=talk)


def test_full_disk_is_status_507(client):
    "The file size limit of the process stands for a full disk."
    sf.write(file := io.BytesIO(), np.zeros(20*RATE), RATE, format="WAV")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(openai.InternalServerError, match="no space is left") as e:
            client.audio.transcriptions.create(model="toy", file=("a.wav", file.getvalue()))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (e.value.status_code, e.value.code) == (507, "insufficient_storage")


# curl

CURL = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def curl(server, *more, key=TOKEN):
    "Status and body."
    out = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {key}", *more], capture_output=True, text=True, timeout=120
    )
    assert not out.returncode, out.stderr
    body, _, status = out.stdout.rpartition("\n")
    return int(status), body


@CURL
def test_curl(server, client, talk):
    post = lambda *more, **how: curl(server, f"{server.url}/audio/transcriptions", "-F", f"file=@{talk}", *more, **how)
    text = client.audio.transcriptions.create(model="toy", file=talk).text
    assert post("-F", "model=toy", "-F", "response_format=text") == (200, text + "\n")
    status, body = post(
        "-F", "model=whisper-1", "-F", "response_format=verbose_json", "-F", "timestamp_granularities[]=word", "-F",
        "timestamp_granularities[]=segment"
    )
    assert status == 200 and json.loads(body)["words"][-1]["end"] > 40 and json.loads(body)["segments"]
    status, body = post("-N", "-F", "model=toy", "-F", "stream=true")
    assert (
        status == 200
        and body.count("transcript.text.delta") > 2
        and json.loads(body.rstrip().splitlines()[-1].removeprefix("data: "))["text"] == text
    )
    assert json.loads(curl(server, f"{server.url}/models")[1])["data"][0]["id"] == "toy"
    for status, code, (got, body) in (
        (404, "model_not_found", post("-F", "model=x")),
        (401, "invalid_api_key", post("-F", "model=toy", key="x")),
        (400, "missing_required_parameter", curl(server, f"{server.url}/audio/transcriptions", "-F", "model=toy")),
        (404, "unknown_url", curl(server, f"{server.url}/audio/translations", "-F", "model=toy")),
        (400, "invalid_content_type", curl(server, f"{server.url}/audio/transcriptions", "-d", "model=toy")),
    ):
        assert (got, json.loads(body)["error"]["code"]) == (status, code)


@CURL
def test_too_large_upload_of_curl_is_refused_before_its_body(server, tmp_path):
    with (tmp_path/"huge.wav").open("wb") as file: file.truncate(2 << 30)
    began = time.monotonic()
    status, body = curl(
        server, f"{server.url}/audio/transcriptions", "-H", "Expect: 100-continue", "-F",
        f"file=@{tmp_path / 'huge.wav'}", "-F", "model=toy", "-w", "\n%{size_upload}\n%{http_code}"
    )
    body, _, sent = body.rpartition("\n")
    assert (status, json.loads(body)["error"]["code"], int(sent)) == (413, "file_too_large", 0) and time.monotonic() - began < 60
    assert (
        curl(
            server, f"{server.url}/audio/transcriptions", "-H", "Expect: 100-continue", "-F",
            f"file=@{tmp_path / 'huge.wav'}", "-F", "model=toy", key="x"
        )[0]
        == 401
    )


@pytest.mark.parametrize(
    "headers, named",
    [({}, "a\1.wav"), ({"Content-Encoding": "gzip"}, "a.wav"), ({}, "a" * 9000 + ".wav")],
    ids=["control character", "no gzip", "long name"],
)
def test_malformed_form_is_status_400(server, talk, headers, named):
    form = (
        f'--x\r\nContent-Disposition: form-data; name="file"; filename="{named}"\r\n\r\n'.encode()
        + Path(talk).read_bytes()
        + b"\r\n--x--\r\n"
    )
    asked = urllib.request.Request(
        f"{server.url}/audio/transcriptions",
        form,
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "multipart/form-data; boundary=x"} | headers,
    )
    with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(asked, timeout=60)
    assert e.value.code == 400 and json.load(e.value)["error"]["code"] == "invalid_body" and not server.log


@CURL
@pytest.mark.parametrize("stream", ["false", "true"])
def test_client_that_disconnects_while_waiting_is_cancelled(server, talk, stream, caplog):
    server.service.delay, before = 1., server.service.cancelled
    process = subprocess.Popen(
        [
            "curl", "-sN", f"{server.url}/audio/transcriptions", "-H", f"Authorization: Bearer {TOKEN}", "-F",
            f"file=@{talk}", "-F", "model=toy", "-F", f"stream={stream}"
        ],
        stdout=subprocess.DEVNULL,
    )
    until(lambda: server.service.running)
    process.kill()
    process.wait()
    until(lambda: server.service.cancelled == before + 1 and not server.routes.open_requests)
    time.sleep(0.2) # aiohttp logs after the handler
    assert not caplog.text


def test_client_that_disconnects_while_uploading_leaves_no_file(server, caplog):
    for closing in ("close", "reset"):
        with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as s:
            s.sendall(
                f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000000\r\n\r\n"
                "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n".encode()
                + bytes(200_000)
            )
            until(lambda: any(Path(server.uploads).rglob("recording*")))
            if closing == "reset": s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: not os.listdir(server.uploads))
    time.sleep(0.2) # aiohttp logs after the handler
    assert not server.log and not caplog.text

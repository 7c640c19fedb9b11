"The web page in a real browser: microphone, file, correction, token; no requests to other hosts."
import asyncio
import contextlib
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile as sf

from ai2text.serving.server import running
from ai2text.testing.toy_bundle import toy_bundle, whistle

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--no-first-run",
    "--disable-sync", "--disable-quic"
]
TOKEN = "a token of the page's tests"


@pytest.fixture(autouse=True)
def browser():
    if CHROMIUM: return
    if os.environ.get("AI2TEXT_CI") == "1": pytest.fail("no Chromium on PATH: the page is not tested")
    pytest.skip("no Chromium on PATH: the page is not tested")


@contextlib.asynccontextmanager
async def opened(tmp_path, words="một hai", scheme="light", kind="streaming_ctc", **settings):
    "A service, and its page in a browser whose fake microphone plays `words` once."
    from playwright.async_api import async_playwright

    sf.write(
        tmp_path / "microphone.wav", np.concatenate([np.zeros(8000), whistle(words, seconds=0.4)[0], np.zeros(48_000)]),
        16_000, subtype="PCM_16"
    )
    flags = [
        *FLAGS,
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}%noloop",
    ]
    detector = {} if kind == "streaming_ctc" else dict(vad="loudness") # Silero does not take tones for speech
    async with running(toy_bundle(tmp_path/"bundle", kind=kind), **detector, **settings) as service, async_playwright() as playwright:
        context = await playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=flags, color_scheme=scheme, permissions=["microphone"]
        )
        try:
            page, requests, errors = context.pages[0], [], []
            page.set_default_timeout(20_000)
            page.on("request", lambda r: requests.append(r.url))
            page.on("console", lambda m: m.type in ("error", "warning") and errors.append(m.text))
            page.on("pageerror", lambda e: errors.append(str(e)))
            await page.goto(service.url)
            yield service, page, errors
            foreign = [url for url in requests if not url.startswith((service.url, "blob:", "data:"))]
            assert not foreign, f"requests to other hosts: {foreign}"
        finally: await context.close()


async def state(page, words):
    "Wait for the page's status."
    from playwright.async_api import expect
    await expect(page.locator("#state")).to_have_text(re.compile(re.escape(words)), timeout=30_000)


async def shows(page, words):
    "Wait for the transcript."
    from playwright.async_api import expect
    await expect(page.get_by_role("log")).to_contain_text(words, ignore_case=True, timeout=30_000)


@pytest.mark.parametrize("kind", ["streaming_ctc", "chunk_ctc", "ctc", "whisper"])
def test_microphone(tmp_path, kind):
    async def main():
        async with opened(tmp_path, "một hai ba", kind=kind, **({} if kind == "streaming_ctc" else dict(every=0.2))) as (
            service,
            page,
            errors,
        ):
            await page.get_by_role("button", name="Start microphone").click()
            await state(page, "Listening")
            await shows(page, "một") # before the microphone stops
            assert await page.get_by_role("button", name="Stop").get_attribute("aria-pressed") == "true"
            await shows(page, "ba")
            await page.get_by_role("button", name="Stop").click()
            await state(page, "Done.")
            assert (await page.get_by_role("log").inner_text()).split() == ["Một", "hai", "ba."]
            assert re.fullmatch(r"confidence \d+%, [\d.]+ to [\d.]+ s", await page.locator("#text p").first.get_attribute("title"))
            assert "do not expect words" in await page.locator("#model").inner_text() # training data of the model
            assert await page.get_by_role("button", name="Start microphone").get_attribute("aria-pressed") == "false"
            assert not errors
    asyncio.run(main())


def test_file_correction_and_token(tmp_path):
    "A stereo recording of another rate, with a token; the saved segment is corrected."
    wave = np.repeat(whistle("ba một")[0], 3) # 48 kHz
    sf.write(tmp_path/"talk.flac", np.stack([wave, wave*0.5], 1), 48_000)
    (tmp_path/"letter.txt").write_text("no audio")
    async def main():
        async with opened(tmp_path, keep=str(tmp_path/"kept"), token=TOKEN) as (service, page, errors):
            chooser = page.locator("#file")
            await page.get_by_label("Token").wait_for()
            await chooser.set_input_files(tmp_path/"talk.flac")
            await state(page, "Did not start: is the token right?")
            await page.get_by_label("Token").fill(TOKEN)
            errors.clear() # the browser itself reports the refusal
            await chooser.set_input_files(tmp_path/"letter.txt")
            await state(page, "Did not start: letter.txt is no recording")
            await chooser.set_input_files(tmp_path/"talk.flac")
            await state(page, "Done.")
            field = page.get_by_label("What was said")
            assert await field.input_value() == "ba một"
            await field.fill("bà một")
            await page.get_by_role("button", name="Correct").click()
            await page.get_by_text("Saved, thank you.").wait_for()
            assert not errors
        (row,) = [json.loads(p.read_text()) for p in (tmp_path/"kept").glob("*.json")]
        assert (row["pred_text"], row["text"]) == ("ba một", "bà một")
        assert sf.info(tmp_path/"kept"/row["audio_filepath"]).samplerate == 16_000
    asyncio.run(main())


def test_dropped_file_and_killed_worker(tmp_path):
    "A worker killed during a microphone stream loses no word."
    sf.write(tmp_path/"talk.wav", whistle("hai")[0], 16_000)
    async def main():
        async with opened(tmp_path) as (service, page, errors):
            await page.evaluate(
                """async bytes => {
                const given = new DataTransfer();
                given.items.add(new File([new Uint8Array(bytes)], "talk.wav"));
                document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true}));
            }""",
                list((tmp_path / "talk.wav").read_bytes()),
            )
            await state(page, "Done.")
            assert await page.get_by_role("log").inner_text() == "Hai."
            await page.get_by_role("button", name="Start microphone").click()
            await state(page, "Listening")
            while not service.streams: await asyncio.sleep(0.01)
            for pid in service.workers.pids: os.kill(pid, 9)
            await shows(page, "hai")
            await page.get_by_role("button", name="Stop").click()
            await state(page, "Done.")
            assert await page.get_by_role("log").inner_text() == "Một hai."
            await page.locator("#file").set_input_files(tmp_path/"talk.wav")
            await state(page, "Done.")
            assert not errors
    asyncio.run(main())

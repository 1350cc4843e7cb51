"""The page of the server in a headless Chromium: these tests run by `make test-page` alone, and fail without a browser.

They need Chromium and its driver (on Debian: chromium and chromium-driver; elsewhere the variables CHROMIUM and
CHROMEDRIVER name them) and the package's extra `page`. `make test` leaves them out by their marker, `browser`.
"""

import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
import soundfile
from websockets.sync.client import connect

from dsm_jax.serving.config import ASR_PATH
from tests.helpers.browser import Browser, MissingError, browser, programs, traffic
from tests.helpers.page import AUDIO, JACKSON, serving, write_microphone

pytestmark = pytest.mark.browser

SPOKEN = [word["text"] for word in json.loads((AUDIO / "digits_jackson.json").read_text())["words"]]
KEY = "a key for tests"


@pytest.fixture(scope="module")
def server():
    with serving("--slots", "2", "--tts-slots", "2") as (url, _):
        yield url


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    return write_microphone(tmp_path_factory.mktemp("microphone") / "digits.wav")


@pytest.fixture
def page(tmp_path, microphone):
    try:
        with browser(tmp_path, microphone) as opened:
            yield opened
    except MissingError as missing:
        pytest.fail(str(missing))


@contextlib.contextmanager
def hold(url: str) -> Iterator[None]:
    """Hold a place of the server."""
    with connect(f"{url.replace('http', 'ws')}{ASR_PATH}") as session:
        assert msgpack.unpackb(session.recv())["type"] == "Ready"
        yield


def heard(page: Browser) -> list[str]:
    """Listen to the microphone until it has said all, and return the words."""
    page.click("mic")
    page.wait(lambda: len(page.words()) >= len(SPOKEN) - 1)
    page.wait(lambda: float(page.text("elapsed").replace(":", "")) >= 9)
    page.click("mic")
    page.wait(lambda: page.state("listen") == "idle")
    return page.words()


RECORD_PARTIAL = """
    window.partial = [];
    new MutationObserver(() => partial.push(document.getElementById("partial").textContent))
      .observe(document.getElementById("partial"), {childList: true, characterData: true, subtree: true});
    window.levels = [];
    new MutationObserver(() => levels.push(document.getElementById("level").value))
      .observe(document.getElementById("level"), {attributes: true});
"""


def test_what_the_microphone_hears_becomes_the_nine_digits_word_by_word(page, server):
    page.get(server)
    page.run(RECORD_PARTIAL)
    assert heard(page) == SPOKEN
    assert [text for text in page.run("return partial") if text] == SPOKEN  # each was grey before it was solid
    levels = page.run("return levels")
    assert max(levels) > 0.5
    assert levels[-1] == 0.0
    assert page.text("listen-state") == "9 words. Press the microphone to go on."
    found = page.traffic()
    frames = [message for message in found.sent if message["type"] == "Audio"]
    steps = [message["step_idx"] for message in found.received if message["type"] == "Step"]
    assert {len(message["pcm"]) for message in frames[:-1]} == {1920}
    assert steps == list(range(len(frames)))
    assert found.foreign(urlsplit(server).netloc) == []
    assert f"{server.replace('http', 'ws')}{ASR_PATH}" in found.addresses
    assert page.complaints() == []


def test_a_browser_that_does_not_resample_is_heard_too(page, server):
    page.before_pages(
        """
        const create = AudioContext.prototype.createMediaStreamSource;
        window.rates = [];
        AudioContext.prototype.createMediaStreamSource = function (stream) {
          rates.push(this.sampleRate);
          if (this.sampleRate === 24000) throw new DOMException("another rate", "NotSupportedError");
          return create.call(this, stream);
        };
        """
    )
    page.get(server)
    assert heard(page) == SPOKEN
    assert page.run("return rates")[0] == 24_000
    assert page.run("return rates[1]") > 24_000
    assert page.complaints() == []


@pytest.fixture(scope="module")
def transcript():
    """Return the library's transcript of the recording."""
    from dsm_jax import load, transcribe

    return transcribe(load("digits"), JACKSON)


def open_file(page: Browser, path: Path) -> None:
    page.element("file").send_keys(str(path))
    page.wait(lambda: page.state("listen") in ("idle", "error") and not page.text("listen-state").startswith("Press"))


def test_a_file_is_transcribed_and_saved_as_the_library_does(page, server, transcript):
    page.get(server)
    open_file(page, JACKSON)
    assert page.words() == SPOKEN
    page.click("save-txt")
    assert page.saved("digits_jackson.txt").decode().split() == SPOKEN
    page.click("save-srt")
    assert page.saved("digits_jackson.srt").decode() == transcript.to_srt()
    page.click("save-json")
    found, expected = json.loads(page.saved("digits_jackson.json")), transcript.to_dict()
    assert found.keys() == expected.keys()
    for name in ("text", "model", "segments", "pauses"):
        assert found[name] == expected[name]
    assert found["audio"] == "digits_jackson.flac"
    assert found["duration"] == pytest.approx(expected["duration"], abs=0.08)
    assert [(w["text"], w["start"], w["end"]) for w in found["words"]] == [
        (word.text, pytest.approx(word.start, abs=1e-3), pytest.approx(word.end, abs=1e-3)) for word in transcript.words
    ]
    page.click("copy")
    page.wait(lambda: page.text("tool-state") == "Copied.")
    page.click("clear")
    assert page.words() == []
    assert not page.element("save-txt").is_enabled()
    assert page.complaints() == []


def test_a_file_can_be_dropped_and_what_is_no_audio_is_named(page, server):
    page.get(server)
    page.run(
        """
        const data = new DataTransfer();
        data.items.add(new File(["no sound"], "letter.txt"));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        """
    )
    page.wait(lambda: page.state("listen") == "error")
    sentence = "“letter.txt” cannot be decoded: this browser does not know it as audio."
    assert page.text("listen-state") == sentence
    assert page.text("reconnect") == "Try again"
    open_file(page, JACKSON)
    assert page.words() == SPOKEN


def test_text_is_spoken_and_each_word_lit_while_it_is_heard(page, server):
    page.get(server)
    text = page.element("text").get_attribute("value")
    assert text == "one two three four five six seven eight nine zero"
    page.run(
        """
        window.lit = [];
        new MutationObserver((changes) => changes.forEach(({target}) => {
          if (target.classList?.contains("now") && lit.at(-1) !== target.textContent) lit.push(target.textContent);
        })).observe(document.getElementById("spoken"), {attributes: true, subtree: true});
        """
    )
    page.click("say")
    page.wait(lambda: page.state("speak") == "speaking")
    assert page.element("say").get_attribute("aria-pressed") == "true"
    page.wait(lambda: page.state("speak") == "idle")
    assert page.text("speak-state") == "Finished."
    assert page.run("return lit") == text.split()
    page.click("save-wav")
    pcm_T, rate = soundfile.read(io.BytesIO(page.saved("speech.wav")), dtype="float32")
    frames = [message for message in page.traffic().received if message["type"] == "Audio"]
    assert (rate, pcm_T.size) == (24_000, 1920 * len(frames))
    sent_T = np.concatenate([np.asarray(message["pcm"], np.float32) for message in frames])
    assert np.abs(pcm_T - sent_T).max() < 1e-4
    assert page.complaints() == []


def test_a_voice_can_be_chosen(page, server):
    page.get(server)
    page.wait(lambda: page.element("voice").is_displayed())
    offered = page.run("return [...document.getElementById('voice').options].map((option) => option.value)")
    assert offered == ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
    assert page.element("voice").get_attribute("value") == "george"
    page.element("voice").send_keys("theo")
    page.click("say")
    page.wait(lambda: page.state("speak") == "speaking")
    (address,) = [address for address in page.traffic().addresses if "tts" in address]
    assert address.endswith("?format=PcmMessagePack&voice=theo")


def test_speech_can_be_stopped(page, server):
    page.get(server)
    page.click("say")
    page.wait(lambda: page.state("speak") == "speaking")
    page.click("hush")
    assert page.state("speak") == "idle"
    assert page.element("say").is_enabled()
    assert page.element("save-wav").is_enabled()
    assert page.complaints() == []


def test_a_text_that_the_server_does_not_take_gets_its_sentence(page, server):
    page.get(server)
    page.run("document.getElementById('text').value = 'one '.repeat(5000)")
    page.click("say")
    page.wait(lambda: page.state("speak") == "error")
    sentence = r"The server says: “the text has 5000 words and breaks, of \d+ tokens; this server takes up to .*”\."
    assert re.fullmatch(sentence, page.text("speak-state"))
    page.run("document.getElementById('text').value = '<break time=\"1s\"/>'")
    page.click("say")
    page.wait(lambda: page.state("speak") == "idle")
    assert page.text("speak-state") == "There was nothing to say."
    assert page.complaints() == []


def test_a_full_server_is_explained_and_the_page_can_connect_again(page, server):
    page.get(server)
    with hold(server), hold(server):
        page.click("mic")
        page.wait(lambda: page.state("listen") == "error")
        advice = "The server is full: all of its places are taken. Try again in a moment."
        assert page.text("listen-state") == f"{advice} The server says: “no free channels”."
    assert page.text("reconnect") == "Reconnect"
    page.click("reconnect")
    page.wait(lambda: page.state("listen") == "live")
    page.click("mic")
    page.wait(lambda: page.state("listen") == "idle")


def write_sound(path: Path, pcm_T: np.ndarray, rate: int) -> Path:
    soundfile.write(path, pcm_T, rate)
    return path


def test_silence_between_words_is_marked_as_a_pause_and_ends_a_line(page, server, tmp_path):
    pcm_T, rate = soundfile.read(JACKSON, dtype="float32")
    between = int(1.85 * rate)  # behind the second digit
    pcm_T = np.concatenate([pcm_T[:between], np.zeros(2 * rate, np.float32), pcm_T[between:]])
    page.get(server)
    open_file(page, write_sound(tmp_path / "pause.wav", pcm_T, rate))
    shown = page.run(
        "return [...document.getElementById('finished').children].map((e) => e.textContent || e.className)"
    )
    assert shown == [*SPOKEN[:2], "pause", *SPOKEN[2:]]
    page.click("save-txt")
    assert page.saved("pause.txt").decode() == f"{' '.join(SPOKEN[:2])}\n{' '.join(SPOKEN[2:])}\n"


def test_a_long_file_is_sent_no_faster_than_the_server_takes_it(page, server, tmp_path):
    pcm_T, rate = soundfile.read(JACKSON, dtype="float32")
    path = write_sound(tmp_path / "long.wav", np.tile(pcm_T, 8), rate)
    page.get(server)
    page.run("window.most = 0; setInterval(() => { most = Math.max(most, progress.value) }, 5)")
    open_file(page, path)
    assert page.words() == 8 * SPOKEN
    assert page.run("return most") == pytest.approx(1.0, abs=0.01)
    ahead = most = 0
    for kind in page.traffic().kinds:
        ahead += {"Audio": 1, "Step": -1}.get(kind, 0)
        most = max(most, ahead)
    assert 200 < most < 20 * 12.5 + 2
    assert page.complaints() == []


def test_a_file_can_be_stopped(page, server, tmp_path):
    pcm_T, rate = soundfile.read(JACKSON, dtype="float32")
    said = 60 * SPOKEN  # four minutes, of which a fast machine hears the first before the click comes
    path = write_sound(tmp_path / "long.wav", np.tile(pcm_T, 60), rate)
    page.get(server)
    page.element("file").send_keys(str(path))
    page.wait(lambda: len(page.words()) >= 9)
    page.click("mic")
    page.wait(lambda: page.state("listen") == "idle")
    *words, _ = page.words()  # the last one may have been cut
    assert words[:9] == SPOKEN
    misheard = sum(found != spoken for found, spoken in zip(words, said, strict=False))
    assert misheard <= len(words) / 50  # as the model card has it
    assert len(words) < len(said) - 9
    assert page.traffic().kinds.count("Marker") == 2  # the page's and the server's
    assert page.complaints() == []


def test_a_file_waits_for_a_free_place(page, server):
    page.get(server)
    with hold(server), hold(server):
        page.element("file").send_keys(str(JACKSON))
        page.wait(lambda: page.text("listen-state") == "Waiting for a free place on the server …")
    page.wait(lambda: page.state("listen") == "idle")
    assert page.words() == SPOKEN


def test_a_page_without_a_microphone_says_why_and_takes_files(page, server):
    page.before_pages("Object.defineProperty(Navigator.prototype, 'mediaDevices', {get: () => undefined})")
    page.get(server)
    assert page.text("secure").startswith("Browsers give the microphone only to pages from this machine")
    assert not page.element("mic").is_enabled()
    open_file(page, JACKSON)
    assert page.words() == SPOKEN


TRACK = """
    const ask = navigator.mediaDevices.getUserMedia;
    navigator.mediaDevices.getUserMedia = async function (wanted) {
      const stream = await ask.call(this, wanted);
      [window.track] = stream.getTracks();
      return stream;
    };
"""


def test_a_microphone_that_goes_away_leaves_its_words(page, server):
    page.before_pages(TRACK)
    page.get(server)
    page.click("mic")
    page.wait(lambda: len(page.words()) >= 2)
    page.run("track.dispatchEvent(new Event('ended'))")
    page.wait(lambda: page.state("listen") == "idle")
    words = page.words()
    assert words == SPOKEN[: len(words)]
    assert page.complaints() == []


def test_the_microphone_is_closed_when_the_user_stops(page, server):
    page.before_pages(TRACK)
    page.get(server)
    page.click("mic")
    page.wait(lambda: page.state("listen") == "live")
    assert page.run("return track.readyState") == "live"
    page.click("mic")
    page.wait(lambda: page.state("listen") == "idle")
    assert page.run("return track.readyState") == "ended"


def test_the_page_says_how_far_it_is_behind(page, server):
    page.before_pages("Object.defineProperty(WebSocket.prototype, 'bufferedAmount', {get: () => 25 * 9619})")
    page.get(server)
    page.click("mic")
    page.wait(lambda: re.fullmatch(r"2\.\d s behind", page.text("behind")))


def test_a_microphone_that_is_not_allowed_is_explained(tmp_path, microphone, server):
    with browser(tmp_path, microphone, allowed=False) as page:
        page.get(server)
        page.click("mic")
        page.wait(lambda: page.state("listen") == "error")
        assert page.text("listen-state").startswith("The microphone is not allowed.")


def test_space_starts_and_stops_the_microphone_but_writes_in_the_text(page, server):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    page.get(server)
    press(Keys.SPACE)
    page.wait(lambda: page.state("listen") == "live")
    assert page.element("mic").get_attribute("aria-pressed") == "true"
    press(Keys.SPACE)
    page.wait(lambda: page.state("listen") == "idle")
    assert page.element("mic").get_attribute("aria-pressed") == "false"
    page.element("text").clear()
    page.element("text").send_keys("one", Keys.SPACE, "two")
    assert page.element("text").get_attribute("value") == "one two"
    assert page.state("listen") == "idle"
    page.element("text").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.state("speak") == "speaking")
    press(Keys.NULL, Keys.ESCAPE)
    page.wait(lambda: page.state("speak") == "idle")
    # Tab reaches every control that can be used, and the focus is seen.
    page.run("document.activeElement.blur()")
    reached = set()
    for _ in range(20):
        press(Keys.TAB)
        reached.add(page.run("return document.activeElement.id"))
        outline = page.run("return document.activeElement.id && getComputedStyle(document.activeElement).outlineWidth")
        assert outline in ("", "3px")
    usable = page.run(
        "return [...document.querySelectorAll('button, select, textarea')]"
        ".filter((e) => !e.disabled && e.checkVisibility()).map((e) => e.id)"
    )
    assert set(usable) <= reached
    assert page.complaints() == []


# Each visible text with its colour and the colour of the ground behind it.
COLOURS = """
    const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
      const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
      const visible = element.checkVisibility() && !element.closest(".unseen, option, svg");
      if (!visible || !(own || element.matches("textarea, input"))) continue;
      let ground = element;
      const clear = ([r, g, b, opacity]) => opacity === 0;
      const behind = () => rgb(getComputedStyle(ground).backgroundColor);
      while (ground.parentElement && clear(behind())) ground = ground.parentElement;
      found.push([element.textContent.trim().slice(0, 40), rgb(getComputedStyle(element).color), behind()]);
    }
    return found;
"""


def contrast(colour: list[float], ground: list[float]) -> float:
    """Return the contrast ratio of two colours, WCAG 2.2."""

    def luminance(rgb: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    one, other = sorted((luminance(colour), luminance(ground)))
    return (other + 0.05) / (one + 0.05)


def pale(page: Browser) -> list[str]:
    """Return the texts whose contrast to the ground is too small to be read."""
    return [text for text, colour, ground in page.run(COLOURS) if contrast(colour, ground) < 4.5]


def nameless(page: Browser) -> list[str]:
    """Return the elements for a user's hand that assistive technology has no name for."""
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    kinds = {"button", "textbox", "combobox", "meter", "progressbar", "region", "timer", "image"}
    named = [
        (node["role"]["value"], node["name"]["value"].strip())
        for node in nodes
        if not node["ignored"] and "name" in node
    ]
    assert {"button", "textbox", "meter", "region"} <= {kind for kind, _ in named}
    return [kind for kind, name in named if kind in kinds and not name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_and_every_control_has_a_name(page, server, scheme):
    page.prefer(color_scheme=scheme)
    page.get(server)
    open_file(page, JACKSON)
    page.run(
        """
        document.querySelectorAll("[hidden]").forEach((element) => (element.hidden = false));
        document.getElementById("partial").textContent = "partial";
        document.getElementById("behind").textContent = "2.0 s behind";
        document.getElementById("spoken").innerHTML = "<i class=said>said</i> <i class=now>now</i> <i>next</i>";
        """
    )
    assert pale(page) == []
    assert nameless(page) == []
    page.run(
        """
        document.getElementById("text").removeAttribute("id");
        const hint = document.getElementById("listen-hint");
        hint.textContent = "pale";
        hint.style.color = "rgb(140, 140, 140)";
        hint.style.background = "rgb(120, 120, 120)";
        """
    )
    assert pale(page) == ["pale"]
    assert nameless(page) == ["textbox"]


@pytest.mark.parametrize("width", [320, 375, 640, 1280])
def test_nothing_is_wider_than_the_page(page, server, width):
    # 1280 pixels at 200 % zoom are 640 of the page.
    page.resize(width, 800, mobile=width < 640)
    page.get(server)
    open_file(page, JACKSON)
    page.click("say")
    page.wait(lambda: page.state("speak") == "speaking")
    wide = "return [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.closest('.unseen')"
    wide += " && e.getBoundingClientRect().right > arguments[0] + 0.5).map((e) => e.outerHTML.slice(0, 80))"
    assert page.run(wide, width) == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.run("document.getElementById('mic').style.marginLeft = '1300px'")
    assert page.run(wide, width)


def test_words_that_stand_are_told_to_screen_readers_and_others_are_not(page, server):
    page.get(server)
    live = page.run(
        "return [...document.querySelectorAll('[aria-live]')].map((e) => [e.id, e.getAttribute('aria-live')])"
    )
    assert live == [["finished", "polite"]]
    assert page.element("partial").get_attribute("aria-hidden") == "true"


def test_nothing_moves_for_users_who_want_less_motion(page, server):
    moving = "return getComputedStyle(document.getElementById('mic')).transitionDuration"
    page.get(server)
    assert page.run(moving) != "0s"
    page.prefer(reduced_motion="reduce")
    assert page.run(moving) == "0s"


def test_a_server_with_a_key_asks_for_it_keeps_it_in_the_tab_and_ends_with_a_sentence(page):
    with serving("--stt", "digits", "--slots", "1", DSM_JAX_API_KEYS=KEY) as (url, process):
        page.get(url)
        assert page.text("key-text") == "This server needs a key."
        page.element("key").send_keys("another key")
        page.element("key").submit()
        page.wait(lambda: page.text("key-text") == "The server does not know this key.")
        page.element("key").send_keys(KEY)
        page.element("key").submit()
        page.wait(lambda: page.text("served") == "digits")
        assert not page.element("key-form").is_displayed()
        assert page.run("return [Object.values(sessionStorage), localStorage.length, document.cookie]") == [
            [KEY],
            0,
            "",
        ]
        assert page.text("speak-state") == "This server serves no model that speaks."
        page.get(url)
        assert page.text("served") == "digits"
        refusals = page.complaints()
        assert refusals
        assert all("401 (Unauthorized)" in line for line in refusals)
        page.click("mic")
        page.wait(lambda: page.words())
        process.send_signal(signal.SIGTERM)
        page.driver.switch_to.new_window("tab")
        page.driver.get(url)
        page.run(f"sessionStorage.setItem('dsm-jax key', {json.dumps(KEY)})")
        page.get(url)
        page.click("mic")
        page.wait(lambda: page.state("listen") == "error")
        assert page.text("listen-state") == (
            "The server is shutting down or not ready. It says: “the server takes no sessions”."
        )
        page.driver.close()
        page.driver.switch_to.window(page.driver.window_handles[0])
        assert page.state("listen") == "live"
        process.send_signal(signal.SIGTERM)
        page.wait(lambda: page.state("listen") == "error")
        assert re.match(r"The server is shutting down\.|The connection was lost\.", page.text("listen-state"))
        words = page.words()
        assert words == SPOKEN[: len(words)]  # what was heard is kept
        process.wait(30)
        page.click("reconnect")
        page.wait(lambda: page.text("listen-state") == "The server cannot be reached. Is it still running?")
        assert page.words()[: len(words)] == words


def test_complaints_and_foreign_addresses_are_found(page, server):
    page.get(server)
    page.complaints()
    page.run("document.body.setAttribute('style', 'color: red')")
    assert any("style-src" in line for line in page.complaints())
    page.run("console.error('planted')")
    assert any("planted" in line for line in page.complaints())
    asked = {"method": "Network.requestWillBeSent", "params": {"request": {"url": "https://elsewhere.org/font"}}}
    assert traffic([asked]).foreign("127.0.0.1:8080") == ["https://elsewhere.org/font"]


def test_a_browser_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    sentence = (
        "no-such-browser was not found; install it, as in apt-get install chromium chromium-driver, or name it by"
    )
    with pytest.raises(MissingError, match=sentence):
        programs()


def test_a_driver_that_is_not_installed_is_named(monkeypatch, tmp_path, microphone):
    monkeypatch.setitem(sys.modules, "selenium", None)
    sentence = "selenium was not found; install it: pip install 'dsm-jax\\[page\\]'"
    with pytest.raises(MissingError, match=sentence), browser(tmp_path, microphone):
        pass

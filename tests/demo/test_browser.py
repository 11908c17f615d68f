"""The page in Chromium: drawing, stopping, painting, following a run; nothing goes elsewhere."""

import contextlib
import io
import json
import shutil
import signal
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

import mdt_jax
from mdt_jax import sample
from tests.conftest import SMOKE, run_here, start_command
from tests.demo.test_server import served
from tests.runs import DIGITS

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="Chromium is not installed: the packages chromium and chromium-driver",
    ),
]
SWITCHES = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip
SECONDS = 240
TAB = 'button[role="tab"]'
BUTTON = 'button:not([role="tab"]):not([tabindex="-1"])'  # gradio measures tabs with a hidden copy
# Training that goes on for as long as a test looks at it.
ENDLESS = [
    *SMOKE, "--config.train.steps=100000", "--config.train.sample_every=40",
    "--config.train.log_every=5", "--config.train.checkpoint_every=100000",
]  # fmt: skip


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The workdir of a run that is training."""
    workdir = tmp_path_factory.mktemp("training") / "run"
    process = start_command("mdt_jax.main", *ENDLESS, f"--workdir={workdir}")
    try:
        until = time.time() + SECONDS
        while not (workdir / "samples" / "0000040.png").exists():
            assert process.poll() is None and time.time() < until
            time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        yield workdir, process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def link(training):
    with served(f"--checkpoint={DIGITS}", f"--workdir={training[0]}") as (_, link):
        yield link


class Browser:
    """A page in Chromium, found by what a person sees."""

    def __init__(self, link: str, width: int):
        options = webdriver.ChromeOptions()
        for switch in SWITCHES:
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver, self.link = webdriver.Chrome(options=options, service=service), link
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(link)
        self.until(lambda: self.named("button", "Draw"))

    def until(self, found):
        """What `found` returns, once it is true; elements may be replaced meanwhile."""
        wait = WebDriverWait(self.driver, SECONDS, 0.2, [StaleElementReferenceException])
        return wait.until(lambda _: found())

    def shown(self, css: str) -> list:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()]

    def named(self, css: str, text: str) -> list:
        return [element for element in self.shown(css) if element.text.split("\n")[0] == text]

    def press(self, text: str, css: str = BUTTON) -> None:
        def click() -> bool:
            for element in self.named(css, text)[:1]:
                scroll = "arguments[0].scrollIntoView({block: 'center'})"
                self.driver.execute_script(scroll, element)
                element.click()
                return True
            return False

        self.until(click)

    def open(self, tab: str) -> None:
        """Turn to a tab. A narrow page has the rest of them in a menu."""
        if not self.named(TAB, tab):
            self.shown(".overflow-menu > button")[0].click()
        self.press(tab, f"{TAB}, .overflow-dropdown button")

    def field(self, label: str):
        """The input with a label, as a screen reader finds it."""
        inputs = "input, textarea"
        return self.until(
            lambda: [e for e in self.shown(inputs) if label in (e.accessible_name or "")]
        )[0]

    def write(self, label: str, text: str) -> None:
        element = self.field(label)
        element.send_keys(Keys.CONTROL + "a")
        element.send_keys(text + Keys.TAB)

    def state(self) -> str:
        return " ".join(element.text for element in self.shown('[role="status"], [role="alert"]'))

    def picture(self, place: int = 0) -> bytes:
        """The bytes of a shown picture of the server."""
        pictures = [image.get_attribute("src") for image in self.shown(".pixels img")]
        with urllib.request.urlopen(pictures[place]) as answer:
            return answer.read()

    def check(self) -> None:
        """No error in the console, and no request but to the server."""
        severe = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        assert not severe, severe
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                assert url.startswith((self.link, "data:", "blob:", "chrome")), url


@contextlib.contextmanager
def opened(link: str, width: int = 1280):
    browser = Browser(link, width)
    try:
        yield browser
        browser.check()
    finally:
        browser.driver.quit()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_draw(link, tmp_path):
    """Two classes, another guidance; the picture is that of the command. Then a bad seed."""
    with opened(link) as page:
        for name in "38":
            page.field("Classes").send_keys(name)
            page.field("Classes").send_keys(Keys.ENTER)
        page.press("How to sample")
        curve = page.until(lambda: page.shown(".weight svg"))[0].get_attribute("aria-label")
        page.write("number input for Guidance scale", "5")
        page.until(lambda: page.shown(".weight svg")[0].get_attribute("aria-label") != curve)
        assert "to 5 at the sample" in page.shown(".weight svg")[0].get_attribute("aria-label")
        page.write("Steps", "4")
        page.write("Pictures", "6")
        page.write("Seed", "7")
        page.press("Draw")
        page.until(lambda: "Done." in page.state())
        command = page.field("The same as a command").get_attribute("value")
        out = tmp_path / "samples.png"
        run_here(sample.main, *command.split()[3:-1], f"--out={out}")
        assert {"--labels=3,8", "--guidance_scale=5", "--seed=7"} <= {*command.split()}
        assert page.picture() == out.read_bytes()

        page.write("Seed", "-1")
        page.press("Draw")
        page.until(lambda: "seed is -1" in page.state())
        (sentence,) = page.shown(".error")
        red, green, *_ = map(int, sentence.value_of_css_property("color")[5:-1].split(",")[:3])
        assert red > 100 and green < 50 and "Traceback" not in page.driver.page_source


def test_by_keyboard(link):
    """Tab reaches every field and button of a tab; the arrows move a slider, Enter draws."""
    with opened(link) as page:

        def go_to(name: str, key=Keys.TAB):
            for _ in range(60):
                here = page.driver.switch_to.active_element
                if name in (here.accessible_name or "") or here.text.split("\n")[0] == name:
                    return here
                here.send_keys(key)
            raise AssertionError(f"no {name!r}")

        go_to("How to sample").send_keys(Keys.ENTER)
        (curve,) = page.until(lambda: page.shown(".weight svg"))
        assert "to 3.8 at the sample" in curve.get_attribute("aria-label")
        go_to("range slider for Guidance scale").send_keys(Keys.ARROW_RIGHT)
        page.until(lambda: page.shown('.weight svg[aria-label$="to 3.81 at the sample"]'))
        go_to("Steps", Keys.SHIFT + Keys.TAB).send_keys(Keys.CONTROL + "a", "3")
        go_to("Draw").send_keys(Keys.ENTER)  # the tab
        go_to("Pictures").send_keys(Keys.CONTROL + "a", "2", Keys.TAB)
        go_to("Draw").send_keys(Keys.ENTER)
        page.until(lambda: "Done." in page.state())


def test_stop(link):
    with opened(link) as page:
        page.press("How to sample")
        page.write("Steps", "1000")
        page.press("Draw")
        page.until(lambda: " of 1,000 steps" in page.state())
        page.press("Stop")
        page.until(lambda: "Stopped." in page.state())


def test_the_queue(link):
    """One job at a time; the other sees its place, and Stop takes it from the queue."""
    with opened(link) as one, opened(link) as other:
        one.press("How to sample")
        one.write("Steps", "1000")
        one.write("Pictures", "100")
        one.press("Draw")
        one.until(lambda: " of 1,000 steps" in one.state())
        other.press("Draw")
        other.until(lambda: "queue: 1/1" in [e.text[:10] for e in other.shown(".progress-text")])
        other.press("Stop")
        other.until(lambda: not other.shown(".progress-text"))
        other.press("Draw")
        one.press("Stop")
        one.until(lambda: "Stopped." in one.state())
        other.until(lambda: "Done." in other.state())


def test_inpaint(link):
    with opened(link) as page:
        page.press("How to sample")
        page.write("Steps", "12")
        page.open("Inpaint")
        page.write("Seed", "3")
        page.press("Draw a sample to paint on")
        page.until(lambda: "Done." in page.state())
        (canvas,) = page.shown("canvas")
        brush = page.shown('button[aria-label="Brush"], button[title="Brush"]')
        if brush:
            brush[0].click()
        width = canvas.size["width"]
        actions = ActionChains(page.driver).move_to_element(canvas)
        actions.move_by_offset(-width // 12, -20).click_and_hold()
        for _ in range(8):
            actions.move_by_offset(width // 48, 2)
        actions.release().perform()
        page.press("How to inpaint")
        page.write("Jump length", "2")
        page.write("Passes", "2")
        page.press("Inpaint")
        page.until(lambda: len(page.shown(".pixels img")) == 2)
        complete, seen = pixels(page.picture(0)), pixels(page.picture(1))
        hidden = (seen[::48, ::48, :3] == (200, 40, 40)).all(-1)
        pipeline = mdt_jax.sampling.pipeline.Pipeline.load(DIGITS)
        (known,) = mdt_jax.to_uint8(pipeline.generate([0], seed=3, num_steps=12))
        assert hidden.any() and not hidden.all()
        assert (complete[~hidden] == known[~hidden, 0]).all()
        assert (complete[hidden] != known[hidden, 0]).any()


def test_a_run_that_trains(link, training):
    workdir, process = training
    with opened(link) as page:
        page.open("Run")
        page.until(lambda: page.shown('svg[aria-label="Loss"]'))
        loss = page.shown('svg[aria-label="Loss"]')[0]
        assert {"full pass", "masked pass"} <= {*loss.text.split("\n")}
        before, state = page.picture(), page.state()
        process.send_signal(signal.SIGCONT)
        page.until(lambda: len(list((workdir / "samples").iterdir())) > 2)
        page.until(lambda: page.picture() != before and page.state() != state)
        process.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize("width", [1280, 400])
def test_every_tab_fits(link, width, tmp_path):
    """No tab is wider than the screen; every field has a name for a screen reader."""
    with opened(link, width) as page:
        page.press("How to sample")
        for name in ("Draw", "On the way", "Inpaint", "Run"):
            page.open(name)
            time.sleep(1)
            wide = page.driver.execute_script("return document.documentElement.scrollWidth")
            assert wide <= width, name
            for element in page.shown("input, textarea"):
                assert element.accessible_name, element.get_attribute("outerHTML")
            page.driver.save_screenshot(str(tmp_path / f"{width}-{name.replace(' ', '-')}.png"))

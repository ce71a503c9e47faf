"""The page in a real browser: Debian's Chromium, where there is one."""

import shutil

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")
from playwright import sync_api
from playwright.sync_api import expect

from tests.serving import make_agent, png, running

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture(autouse=True, scope="module")
def _short_waits():
    expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def address():
    with running({"tiny": make_agent(256), "other": make_agent(256, images=1)}) as found:
        yield found


@pytest.fixture
def page(browser, address):
    """The page, loaded. Errors of its scripts and requests to other servers fail the test."""
    page, problems = browser.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console", lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None
    )
    page.on(
        "request",
        lambda request: (
            problems.append(request.url) if not request.url.startswith((address, "blob:", "data:")) else None
        ),
    )
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    yield page
    page.close()
    assert problems == []


def show(page, *colours):
    files = [{"name": f"{colour}.png", "mimeType": "image/png", "buffer": png(colour)} for colour in colours]
    page.set_input_files("#file", files)
    page.wait_for_selector("#stage:not([hidden])")


def brightness(page) -> list[int]:
    """Red of each pixel of the stage."""
    return page.evaluate("""() => {
        const stage = document.getElementById("stage");
        const pixels = stage.getContext("2d").getImageData(0, 0, stage.width, stage.height).data;
        return [...pixels].filter((_, i) => i % 4 === 0);
    }""")


def test_a_question_is_answered_and_shows_where_its_words_looked(page):
    show(page, "white")
    page.fill("#question", "what is it?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#looked:not([hidden])")
    assert page.inner_text("#log .question") == "what is it?" and page.inner_text("#log .answer")
    assert page.locator("#words button[aria-pressed=true]").count() == 1
    dark = brightness(page)
    page.evaluate(
        """() => { const s = document.getElementById("strength"); s.value = 0; s.dispatchEvent(new Event("input")); }"""
    )
    assert set(brightness(page)) == {255} and min(dark) < 100
    assert "ms" in page.inner_text("#stages") and float(page.get_attribute("#latency", "data-first-ms")) > 0
    page.click("#clear")
    assert page.inner_text("#log") == "" and page.locator("#looked").is_hidden()


def test_several_pictures_and_the_keyboard(page):
    show(page, "red", "blue")
    assert page.locator("#thumbs img").count() == 2
    page.locator("#thumbs button").first.click()
    assert "Picture 1 of 2: red.png" in page.get_attribute("#stage", "aria-label")
    page.locator("body").press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.click("#describe")
    page.wait_for_selector("#send:not([hidden])")
    page.click("#remove")
    page.click("#remove")
    assert page.locator("#stage").is_hidden() and page.locator("#empty").is_visible()
    page.focus("#tab-ask")
    page.keyboard.press("ArrowRight")
    assert page.locator("#compare").is_visible() and page.locator("#ask").is_hidden()


def test_two_models_side_by_side(page):
    show(page, "green")
    page.click("#tab-compare")
    page.fill("#compare-question", "what is it?")
    page.keyboard.press("Enter")
    for side in ("left", "right"):
        expect(page.locator(f"#{side}-time")).to_contain_text("ms")
    assert page.input_value("#left") == "tiny" and page.input_value("#right") == "other"
    assert page.inner_text("#left-answer") == page.inner_text("#right-answer") != ""


def test_what_goes_wrong_is_said(page):
    page.set_input_files("#file", [{"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"}])
    expect(page.locator("#problem")).to_contain_text("notes.png: no picture")
    page.fill("#question", "zqx" * 160)
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("do not fit")


def test_a_phone_scrolls_down_only_and_everything_has_a_name(page):
    page.set_viewport_size({"width": 360, "height": 700})
    show(page, "red")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, a")]
        .filter((each) => each.checkVisibility() && !(each.textContent.trim() || each.ariaLabel || each.labels?.length))
        .map((each) => each.outerHTML)""")
    assert nameless == []


def test_a_key_is_asked_for(browser):
    with running({"tiny": make_agent()}, key="sesame") as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        page.close()


def test_the_list_of_endpoints(page, address):
    page.goto(f"{address}/docs")
    expect(page.locator("#paths")).to_contain_text("POST /v1/chat/completions")

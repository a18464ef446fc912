"""Editing on the page, in a real Chromium: pictures come in every way, masks are painted with everything."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import PICTURES, Page, browser, choose, expect, opened, page  # noqa: F401

from conftest import random_model, tiny_config
from ecar.pretrained.folders import save_model
from ecar.tokenizers import PixelTokenizer
from served import server  # noqa: F401

pytestmark = pytest.mark.slow

READ_MASK = """() => {
    const mask = document.getElementById("mask");
    const data = mask.getContext("2d").getImageData(0, 0, mask.width, mask.height).data;
    return Array.from({length: mask.width * mask.height}, (_, i) => data[4 * i + 3] >= 128);
}"""


def a_picture(width: int = 96, height: int = 64, form: str = "PNG") -> bytes:
    """Grey, as the tokenizer of the bundled model wants it."""
    buffer = io.BytesIO()
    small = Image.fromarray(np.random.default_rng(1).integers(0, 256, (2, 3, 3), dtype=np.uint8))
    small.convert("L").resize((width, height), Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


def put(page: Page, data: bytes = b"", name: str = "picture.png") -> None:  # noqa: F811
    page.locator("#file").set_input_files({"name": name, "mimeType": "image/png", "buffer": data or a_picture()})
    expect(page.locator("#editor")).to_be_visible(timeout=30_000)


def share(page: Page) -> float:  # noqa: F811
    """Of the mask that is painted."""
    return float(np.mean(page.evaluate(READ_MASK)))


def paint(page: Page, *places: tuple[float, float]) -> None:  # noqa: F811
    box = page.locator("#mask").bounding_box()
    assert box is not None
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def shown(page: Page) -> list[str]:  # noqa: F811
    return page.evaluate("[...document.querySelectorAll('figure img')].map((i) => i.src.split(',')[1])")


def pixels(image: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"))


def test_a_generated_image_is_edited_and_the_copied_commands_give_the_same(page: Page, tmp_path: Path) -> None:  # noqa: F811
    choose(page, "Sneaker")
    page.locator("#count").fill("1")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("figure[data-state=finished]")).to_have_count(1, timeout=60_000)
    (original,) = shown(page)
    page.get_by_role("button", name="edit", exact=True).click()
    paint(page, (0.1, 0.35), (0.45, 0.35), (0.45, 0.6), (0.1, 0.6))
    expect(page.locator("#strength-value")).to_have_text("1.00")
    choose(page, "Ankle boot")
    page.locator("#count").fill("3")
    page.locator("#seed").fill("7")
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver((changes) => changes.forEach((c) => window.seen.push(c.target.dataset.state)))
            .observe(document.getElementById("images"),
                {attributes: true, subtree: true, attributeFilter: ["data-state"]});
    }""")
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("figure[data-state=finished]")).to_have_count(3, timeout=60_000)
    assert [page.evaluate("window.seen").count(f"preview {i}") for i in range(3)] == [3] * 3
    drawn = np.array(page.evaluate(READ_MASK)).reshape(32, 32)
    images = shown(page)
    assert len(set(images)) == 3 and 0.05 < drawn.mean() < 0.6
    for image in images:
        same = (pixels(image) == pixels(original)).all(-1)
        assert same[~drawn].all() and not same[drawn].all()
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / "page_edit.png", full_page=True)

    before = page.get_by_role("button", name="before").first
    before.click()
    assert (pixels(shown(page)[0]) == pixels(original)).all() and before.get_attribute("aria-pressed") == "true"
    before.click()
    assert shown(page) == images

    files = list[object]()
    page.on("download", lambda file: files.append(file))
    page.get_by_role("button", name="Save picture and mask").click()
    while len(files) < 2:
        page.wait_for_timeout(50)
    for file in files:
        file.save_as(tmp_path / file.suggested_filename)  # type: ignore[attr-defined]
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#status")).to_have_text("Copied as curl")
    command = page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path).stdout)
    assert [one["b64_json"] for one in answer["data"]] == images
    page.get_by_role("button", name="Copy as Python").click()
    expect(page.locator("#status")).to_have_text("Copied as Python")
    code = page.evaluate("navigator.clipboard.readText()")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result
    assert (tmp_path / "Ankle boot 7.png").read_bytes() == base64.b64decode(images[0])


def test_pictures_are_chosen_dropped_and_pasted_and_other_files_are_told(page: Page) -> None:  # noqa: F811
    put(page, a_picture(form="JPEG"))
    assert page.evaluate("[document.getElementById('mask').width, document.getElementById('mask').height]") == [64, 64]
    page.get_by_role("button", name="Remove picture").click()
    expect(page.get_by_role("button", name="Generate")).to_be_visible()
    for kind in ("drop", "paste"):
        page.evaluate(
            """([kind, text]) => {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], "p.png", {type: "image/png"}));
                const init = {bubbles: true, cancelable: true};
                document.body.dispatchEvent(kind === "drop" ? new DragEvent("drop", {...init, dataTransfer: data})
                    : new ClipboardEvent("paste", {...init, clipboardData: data}));
            }""",
            [kind, base64.b64encode(a_picture(50, 50)).decode()],
        )
        expect(page.locator("#editor")).to_be_visible(timeout=30_000)
        page.get_by_role("button", name="Remove picture").click()
    page.locator("#file").set_input_files({"name": "notes.png", "mimeType": "image/png", "buffer": b"text"})
    expect(page.locator("#status")).to_have_text("notes.png is not a picture that this browser reads")
    put(page, a_picture(3000, 2000))  # sent smaller
    assert page.evaluate("document.getElementById('mask').width") == 1024


def test_a_picture_without_mask_and_class_is_varied(page: Page) -> None:  # noqa: F811
    choose(page)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text("Choose a class first")
    put(page)
    expect(page.locator("#strength-value")).to_have_text("0.50")
    page.locator("#count").fill("2")
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("figure[data-state=finished]")).to_have_count(2, timeout=60_000)
    paint(page, (0.5, 0.5))
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#status")).to_have_text("Choose a class first")


def test_a_mask_is_painted_with_the_keyboard_undone_and_inverted(page: Page) -> None:  # noqa: F811
    put(page)
    page.locator("#mask").focus()
    page.keyboard.press("Space")
    dab = share(page)
    for key in (*["ArrowRight"] * 4, "]", "Enter"):
        page.keyboard.press(key)
    assert 0 < 2 * dab < share(page)
    page.keyboard.press("i")
    inverted = share(page)
    page.get_by_role("button", name="Invert").click()
    assert abs(share(page) + inverted - 1) < 0.02
    for _ in range(3):
        page.keyboard.press("Control+z") if page.locator("#mask:focus").count() else page.locator("#undo").click()
    assert share(page) == dab
    page.get_by_role("button", name="Undo").click()
    assert share(page) == 0
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    page.locator("#strength").focus()
    page.keyboard.press("ArrowLeft")
    page.get_by_role("button", name="Invert").click()
    expect(page.locator("#strength-value")).to_have_text("0.45")  # chosen: it does not follow the mask any more


def test_a_finger_and_a_pen_paint_and_the_page_does_not_scroll(browser, server) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    try:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#classes input", state="attached")
        put(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        heights = [
            b.evaluate("(e) => e.offsetHeight") for b in page.locator("button:visible, input[type=range]:visible").all()
        ]
        assert min(heights) >= 40
        box = page.locator("#mask").bounding_box()
        x, y = box["x"] + 20, box["y"] + 20
        session, top = context.new_cdp_session(page), page.evaluate("scrollY")
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        for step in range(1, 6):
            point = {"x": x, "y": y + 20 * step}
            session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        finger = share(page)
        assert finger > 0.02 and page.evaluate("scrollY") == top
        for kind, at in (("mousePressed", 0), ("mouseMoved", 100), ("mouseReleased", 100)):
            pen = {"type": kind, "x": x + 150, "y": y + at, "button": "left", "buttons": 1, "clickCount": 1}
            session.send("Input.dispatchMouseEvent", {**pen, "pointerType": "pen", "force": 0.9})
        assert share(page) > 2.1 * finger  # pressed hard, it is wider
    finally:
        context.close()


def test_history_brings_picture_mask_and_strength_back(page: Page) -> None:  # noqa: F811
    choose(page, "Bag")
    page.locator("#count").fill("1")
    put(page)
    paint(page, (0.2, 0.2), (0.8, 0.2))
    painted = page.evaluate(READ_MASK)
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#history button")).to_have_count(1, timeout=60_000)
    page.get_by_role("button", name="Remove picture").click()
    page.get_by_role("button", name="edit: Bag, seed 0").click()
    expect(page.get_by_role("button", name="Edit", exact=True)).to_be_enabled()
    assert page.evaluate(READ_MASK) == painted and page.locator("#strength").input_value() == "1"


def test_one_of_a_thousand_classes_is_found(browser, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    kinds = ("cat", "dog", "elk", "fox", "gnu", "hen", "owl", "pig", "rat", "yak")
    names = tuple(f"{kind} {number}" for number in range(100) for kind in kinds)
    save_model(tmp_path / "m", random_model(tiny_config(num_classes=1000, class_names=names)), PixelTokenizer(factor=1))
    with opened(browser, tmp_path / "m") as (_, page):  # noqa: F811
        page.wait_for_selector("#classes input", state="attached")
        page.locator("#filter").fill("OWL 4")
        expect(page.locator("#found")).to_have_text("11 of 1000 classes; Enter chooses owl 4")
        assert page.locator("#classes label:visible").count() == 12  # the chosen first one stays in sight
        page.locator("#filter").press("Enter")
        expect(page.locator("#filter")).to_have_value("")
        assert page.locator("#classes input:checked").count() == 2 and page.locator("figure").count() == 0
        page.locator("#filter").fill("nothing")
        expect(page.locator("#found")).to_have_text("0 of 1000 classes; Enter chooses none")
        page.locator("#classes input:checked").first.uncheck()
        page.locator("#filter").fill("")
        put(page)
        page.locator("#count").fill("1")
        page.get_by_role("button", name="Edit", exact=True).click()
        expect(page.locator("figure[data-state=finished]")).to_have_count(1, timeout=60_000)
        assert page.locator("figcaption span").first.inner_text() == "owl 4"

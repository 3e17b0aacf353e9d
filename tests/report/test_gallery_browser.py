"""The gallery in a real Chromium, opened from the disk."""

import csv
import io

import pytest
from PIL import Image

from prefect_flux_kontext.manifest.reader import Manifest
from tests.support.galleries import (
    failed,
    gallery_of,
    line,
    outside,
    page_errors,
    running_browser,
    until,
)


@pytest.fixture(scope="module")
def browser():
    with running_browser() as started:
        yield started


@pytest.fixture
def opened(browser, tmp_path):
    """Open the gallery of lines; at the end, check for errors and requests elsewhere."""
    contexts, seen = [], []

    def make(lines, *, width=1280, height=900, made=None, **how):
        folder = tmp_path / "out"
        url = gallery_of(folder, lines, **(made or {}))
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        contexts.append(context)
        page = context.new_page()
        requests = []
        seen.append((page_errors(page, requests), requests, folder))
        page.goto(url)
        page.folder = folder
        return page

    yield make
    for context in contexts:
        context.close()
    for errors, requests, folder in seen:
        assert [error for error in errors if "ERR_FILE_NOT_FOUND" not in error] == []
        assert outside(requests, folder) == []


def shown_ids(page):
    return page.locator(".card .id").all_inner_texts()


MIXED = [line(0), failed(1), line(2), line(3, style=None), failed(4, "TIMEOUT", "It took long.")]


def test_page_shows_images_and_failure_reasons(opened):
    page = opened(MIXED)
    assert shown_ids(page) == ["row-0", "row-1", "row-2", "row-3", "row-4"]
    numbers = page.locator("#numbers").inner_text().split()
    assert numbers[:6] == ["images", "3", "failed", "2", "total", "cost"]
    assert "$0.15" in numbers
    assert "CONTENT_VIOLATION" in page.locator(".card.failed").first.inner_text()
    assert page.locator("#histograms svg").count() == 2
    assert "median" in page.locator("#histograms svg").first.get_attribute("aria-label")
    until(page, "[...document.querySelectorAll('.open img')].every(i => i.naturalWidth)")
    page.locator(".card.failed .open").first.click()
    assert "CONTENT_VIOLATION The prompt breaks the rules." in page.locator("#why").inner_text()
    assert page.locator("#slider").is_hidden()


def test_page_shows_cost_by_any_column(opened):
    """Equal rows have one task and are counted once; rows without a value are `other`."""
    teams = ["blue", "red", None, "<b>red</b>"]
    lines = [line(n, team=team, task_id=f"task_{n}") for n, team in enumerate(teams)]
    lines.append(line(5, team="red", task_id="task_0"))
    page = opened(lines)
    page.locator("#spend summary").click()
    rows = page.locator("#spend-rows tr")
    assert rows.all_inner_texts() == [
        "oil\t2 rows\t$0.06",
        "pencil\t1 row\t$0.03",
        "poster\t1 row\t$0.03",
    ]
    page.locator("#spend-by").select_option("team")
    assert {text.split("\t")[0]: text.split("\t")[2] for text in rows.all_inner_texts()} == {
        "blue": "$0.03",
        "red": "$0.03",
        "other": "$0.03",
        "<b>red</b>": "$0.03",
    }


def test_slider_moves_by_mouse_and_keyboard(opened):
    page = opened(MIXED)
    page.locator(".open").first.click()
    before = page.locator("#before")
    before.wait_for()

    def clip_path():
        return before.evaluate("image => getComputedStyle(image).clipPath")

    assert clip_path() == "inset(0px 50% 0px 0px)"
    box = page.locator("#figure").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 60)
    page.mouse.up()
    assert float(clip_path().split()[1].rstrip("%")) == pytest.approx(20, abs=1)
    page.locator("#slider").fill("30")
    page.locator("#slider").press("ArrowLeft")
    assert clip_path() == "inset(0px 71% 0px 0px)"
    assert page.locator("#viewed").inner_text() == "row-0"  # the arrow key only moved the slider


def test_slider_reveals_the_reference(opened):
    page = opened([line(0)])
    page.locator(".open").click()
    page.locator("#before").wait_for()
    until(page, "document.getElementById('after').naturalWidth > 0")
    shot = Image.open(io.BytesIO(page.locator("#figure").screenshot())).convert("RGB")
    left, right = (shot.getpixel((shot.width * of // 4, shot.height // 4)) for of in (1, 3))
    assert left[0] > 200
    assert left[2] < 60
    assert right[2] > right[0] > right[1]


def test_full_image_replaces_the_thumbnail(opened):
    page = opened([line(0, reference_images=None, file="a b/ü#1.jpg")], made={"before": False})
    (page.folder / "a b").mkdir()
    Image.new("RGB", (640, 480), "green").save(page.folder / "a b" / "ü#1.jpg")
    page.locator(".open").click()
    until(page, "document.getElementById('after').naturalWidth === 640")


def test_rows_are_filtered_by_state_style_and_id(opened):
    page = opened(MIXED)
    page.get_by_role("button", name="failed 2").click()
    assert shown_ids(page) == ["row-0", "row-2", "row-3"]
    assert page.locator("#shown").inner_text() == "3 of 5"
    page.locator("#style").select_option("=poster")
    assert shown_ids(page) == ["row-2"]
    page.locator("#style").select_option("=")
    assert shown_ids(page) == ["row-3"]
    page.locator("#search").fill("ROW-1")
    assert page.locator("#none").is_visible()
    page.locator("#all").click()
    assert len(shown_ids(page)) == 5
    page.locator("#search").fill("W-4")
    assert shown_ids(page) == ["row-4"]


def test_page_works_with_the_keyboard_alone(opened):
    page = opened([line(number) for number in range(40)])
    page.keyboard.press("/")
    page.keyboard.type("row")
    page.keyboard.press("ArrowDown")

    def focused():
        return page.evaluate("document.activeElement.getAttribute('aria-label')")

    assert focused() == "row-0, oil, stored"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    across = int(focused().split(",")[0].removeprefix("row-")) - 1
    assert across >= 3
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    assert page.locator("#chosen").inner_text() == "1 selected"
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewed").inner_text() == "row-2"
    page.keyboard.press("Escape")
    page.locator("#viewer").wait_for(state="hidden")
    # The browser dispatches the close event of a dialog later.
    until(page, "document.activeElement.getAttribute('aria-label') === 'row-2, poster, stored'")
    page.keyboard.press("End")
    assert focused() == "row-39, oil, stored"
    assert page.evaluate(
        "document.activeElement.getBoundingClientRect().bottom <= window.innerHeight"
    )


def test_selection_downloads_a_runnable_manifest(opened, tmp_path):
    odd = 'a "quoted",\nprompt'
    rows = [
        line(0, sku="7", manifest_cost_usd="9.99", image="https://example.com/0.jpg"),
        line(1, prompt=odd, sku="8", manifest_cost_usd="", image="https://example.com/1.jpg"),
        line(2, style=None, reference_images=None),
    ]
    page = opened(rows)
    for number in (2, 1):
        page.locator(".card .pick input").nth(number).check()
    with page.expect_download() as download:
        page.locator("#download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "redo.csv"
    cells = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
    assert [row["id"] for row in cells] == ["row-1-pencil", "row-2"]
    assert [row["sku"] for row in cells] == ["8", ""]
    assert "cost_usd" in cells[0]
    made = list(Manifest(str(path)).rows())
    assert [row.request.prompt for row in made] == [odd, "Repaint it"]
    assert [row.request.image_urls for row in made] == [["https://example.com/1.jpg"], []]

    page.locator("#prompt").fill("Quite another way")
    with page.expect_download() as download:
        page.locator("#download").click()
    download.value.save_as(path)
    assert {row.request.prompt for row in Manifest(str(path)).rows()} == {"Quite another way"}
    page.locator("#clear").click()
    assert page.locator("#redo").is_hidden()


EVIL = "</script><img src=x onerror=window.pwned=1><!--\u2028'\"&lt;"


def test_untrusted_values_are_shown_as_text(opened):
    names = ("id", "style", "prompt", "task_id", "provider", "file", EVIL, "__proto__")
    evil = dict.fromkeys(names, EVIL)
    rows = [
        line(0, **evil, reference_images=["javascript:window.pwned=1"]),
        failed(1, EVIL, EVIL, id=f"{EVIL}2", style=EVIL),
    ]
    page = opened(rows)
    assert shown_ids(page) == [EVIL, f"{EVIL}2"]
    for number in range(2):
        page.locator(".open").nth(number).click()
        assert page.locator("#viewed").inner_text() == (EVIL if not number else f"{EVIL}2")
        assert EVIL in page.locator("#facts").inner_text()
        assert page.locator("#facts a[href^='javascript']").count() == 0
        page.keyboard.press("Escape")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img[src=x]").count() == 0
    html = (page.folder / "gallery.html").read_text()
    assert html.count("</script>") == 2
    assert "onerror=window" in html
    assert "<img src=x" not in html


def test_injected_script_does_not_run(opened):
    page = opened([line(0)])
    path = page.folder / "gallery.html"
    path.write_text(path.read_text().replace("<main>", "<main><img src=x onerror='pwned=1'>"))
    messages = []
    context = page.context
    other = context.new_page()
    other.on("console", lambda message: messages.append(message.text))
    other.goto(path.as_uri())
    assert other.evaluate("window.pwned") is None
    assert any("Content Security Policy" in text for text in messages)


def test_page_follows_the_color_scheme(opened):
    def paper(scheme):
        page = opened(MIXED, color_scheme=scheme)
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert paper("light") == "rgb(250, 249, 246)"
    assert paper("dark") == "rgb(22, 23, 26)"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screen_does_not_scroll_sideways(opened, width):
    long = "a" * 200
    rows = [line(0, id=long, prompt=long * 9, style=long), failed(1, message=long), *MIXED[2:]]
    page = opened(rows, width=width, height=800, has_touch=True, is_mobile=True)

    def overflow():
        return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    assert overflow() <= 0
    page.locator(".card .pick input").first.check()
    assert overflow() <= 0
    page.locator("#clear").click()
    page.locator(".open").first.click()
    assert overflow() <= 0
    assert page.evaluate("byId('viewer').scrollWidth <= byId('viewer').clientWidth")
    assert page.locator("#viewer").bounding_box()["width"] == width
    page.locator("#next").click()
    assert page.locator("#viewed").inner_text() == "row-1"


def test_large_gallery_keeps_few_cards_and_loads_on_demand(opened):
    page = opened([line(number) for number in range(10_000)])
    loaded = "[...document.querySelectorAll('.open img')].filter(i => i.naturalWidth).length"
    until(page, f"{loaded} > 10")
    files = len(list((page.folder / "_gallery").glob("run-*.js")))
    assert files > 200
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.evaluate("window.scrollTo(0, document.body.scrollHeight / 2)")
    until(page, "document.querySelector('.card .id').textContent !== 'row-0'")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.get_by_text("row-9999", exact=True).wait_for()
    until(page, f"{loaded} > 5")
    assert page.locator(".card").count() < 100
    assert 1 <= len(requests) < 20
    page.locator("#search").fill("row-4321")
    until(page, f"{loaded} === 1")
    assert shown_ids(page) == ["row-4321"]


def test_all_references_in_all_styles_are_a_matrix(opened):
    """A line for each reference, which comes first, and a column for each style."""
    lines = [
        line(
            number,
            id=f"photo-{number // 3}",
            reference_images=[f"https://x.test/{number // 3}.jpg"],
        )
        for number in (5, 3, 4, 0, 2, 1)
    ]
    page = opened(lines)
    cards = page.locator(".card").evaluate_all(
        """cards => cards
            .map(card => [card.getBoundingClientRect(), card.querySelector(".caption").innerText])
            .sort(([a], [b]) => a.top - b.top || a.left - b.left)
            .map(([, caption]) => caption.split("\\n"))"""
    )
    styles = ["oil", "pencil", "poster"]
    assert cards == [
        ["before"], *(["photo-1", style] for style in styles),
        ["before"], *(["photo-0", style] for style in styles),
    ]  # fmt: skip
    page.locator(".open").nth(0).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#viewed").inner_text() == "photo-0"
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 375, "height": 800})
    until(page, "document.querySelectorAll('.card.reference').length === 0")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.locator("#style").select_option("=oil")
    assert page.locator(".card.reference").count() == 0
    assert shown_ids(page) == ["photo-1", "photo-0"]

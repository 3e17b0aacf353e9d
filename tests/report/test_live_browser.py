"""The live page in a real Chromium, served by `flux-kontext watch`."""

import contextlib
import json
import subprocess
import sys

import pytest

from prefect_flux_kontext.report.results import encode_line
from tests.support.galleries import gallery_of, line, page_errors, running_browser, until


@pytest.fixture(scope="module")
def browser():
    with running_browser() as started:
        yield started


@pytest.fixture
def opened(browser, tmp_path):
    """Watch an output with these lines; at the end, check for errors and requests elsewhere."""
    with contextlib.ExitStack() as stack:

        def make(lines, *, width=1280, height=900, **how):
            folder = tmp_path / "out"
            gallery_of(folder, lines)
            command = [sys.executable, "-m", "prefect_flux_kontext", "watch", str(folder)]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(server.communicate)
            stack.callback(server.terminate)
            url = server.stdout.readline().strip()
            context = browser.new_context(viewport={"width": width, "height": height}, **how)
            stack.callback(context.close)
            page, requests = context.new_page(), []
            errors = page_errors(page, requests)
            page.goto(url)
            stack.callback(check, errors, requests, url)
            page.folder = folder
            return page

        yield make


def check(errors, requests, url):
    assert [error for error in errors if "404" not in error] == []
    here = (url, "data:", "blob:")
    assert [request for request in requests if not request.startswith(here)] == []


def verdicts(page):
    folder = page.folder / "_verdicts"
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(str(each["verdict"]) for each in found)


def test_new_results_appear_without_a_reload(opened):
    page = opened([line(0), line(1)])
    until(page, "document.querySelectorAll('.card').length === 2")
    page.locator(".open").nth(1).focus()
    part = page.folder / "_results/parts/0123456789abcdef-000002.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text("".join(map(encode_line, [line(2, id="<b>new</b>"), line(3)])))
    until(page, "document.querySelectorAll('.card').length === 4")
    assert page.locator(".card .id").nth(2).inner_text() == "<b>new</b>"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row-1")
    assert "No run is in progress" in page.locator("#progress").inner_text()


def test_keys_judge_in_the_grid_and_the_large_view(opened):
    page = opened([line(number) for number in range(4)])
    page.locator(".open").first.focus()
    page.keyboard.press("k")
    until(page, "document.querySelectorAll('.mark.keep').length === 1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("x")
    until(page, "document.getElementById('viewed').textContent === 'row-2'")
    page.keyboard.press("r")
    until(page, "document.getElementById('viewed').textContent === 'row-3'")
    assert verdicts(page) == ["keep", "redo", "reject"]
    page.keyboard.press("Escape")
    page.locator("#verdict").select_option("=kept")
    assert page.locator(".card .id").all_inner_texts() == ["row-0"]
    page.locator(".open").first.focus()
    page.keyboard.press("u")
    until(page, "document.querySelectorAll('.mark.keep').length === 0")


def test_touch_judges_on_a_phone(opened):
    page = opened(
        [line(0), line(1)],
        width=390,
        height=844,
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
    )
    page.locator(".open").first.tap()
    button = page.get_by_role("button", name="Reject")
    assert button.bounding_box()["height"] >= 44
    button.tap()
    until(page, "document.getElementById('viewed').textContent === 'row-1'")
    assert verdicts(page) == ["reject"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_selected_rows_are_redone_with_a_new_prompt_and_style(opened):
    page = opened([line(0), line(1)])
    page.locator(".open").first.focus()
    page.keyboard.press("Space")
    page.locator("#prompt").fill('In "ink", </script>')
    page.locator("#new-style").select_option("noir")
    page.locator("#ask").click()
    until(page, "document.querySelectorAll('.mark.redo').length === 1")
    (record,) = (page.folder / "_verdicts").glob("*.json")
    asked = json.loads(record.read_text())
    assert (asked["prompt"], asked["style"]) == ('In "ink", </script>', "noir")
    assert page.locator("#redo").is_hidden()


def test_variants_stand_side_by_side_and_one_is_best(opened):
    rows = [
        line(
            n,
            id=f"cat-{n // 3}",
            style="oil",
            variant_number=n % 3 + 1,
            reference_images=[f"https://example.com/{n // 3}.jpg"],
        )
        for n in range(6)
    ]
    page = opened(rows)
    until(page, "document.querySelectorAll('.card.reference').length === 2")
    styles = page.locator(".card .style").all_inner_texts()
    assert styles[:3] == ["oil", "oil, variant 2", "oil, variant 3"]
    page.locator(".card:not(.reference) .open").nth(1).click()
    page.get_by_role("button", name="Best").click()
    until(page, "document.getElementById('place').textContent === '3 of 6'")
    page.keyboard.press("Escape")
    until(page, "document.querySelectorAll('.mark.reject').length === 2")
    assert verdicts(page) == ["keep", "reject", "reject"]

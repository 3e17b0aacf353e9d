"""Every block of the documentation runs, page by page."""

import pytest

from tests.docs.blocks import PAGES, blocks_of

pytestmark = pytest.mark.timeout(1200)

NOT_RUN = [block for page in PAGES for block in blocks_of(page) if block.not_run]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_a_page_print_what_it_shows(page, request):
    blocks = [block for block in blocks_of(page) if not block.not_run]
    if not blocks:
        return
    reader = request.getfixturevalue("reader")
    for block in blocks:
        try:
            reader.follow(block)
        except BaseException as error:
            error.add_note(f"This is {block}.")
            raise


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_skipped_block_has_a_reason(block):
    assert len(block.not_run.split()) > 2


@pytest.mark.parametrize("page", PAGES)
def test_saved_file_is_used_later(page):
    blocks = blocks_of(page)
    for number, block in enumerate(blocks):
        if block.file:
            assert any(block.file in later.text for later in blocks[number + 1 :]), str(block)

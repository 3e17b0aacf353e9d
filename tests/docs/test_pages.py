"""Every block of the documentation is run, page by page, as a reader would."""

import pytest

from tests.docs.blocks import PAGES, blocks_of

pytestmark = pytest.mark.timeout(1200)

NOT_RUN = [block for page in PAGES for block in blocks_of(page) if block.not_run]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_do_what_the_page_says(page, request):
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
def test_a_block_that_is_not_run_says_why(block):
    assert len(block.not_run.split()) > 2


@pytest.mark.parametrize("page", PAGES)
def test_what_is_saved_is_used_further_down(page):
    blocks = blocks_of(page)
    for number, block in enumerate(blocks):
        if block.file:
            assert any(block.file in later.text for later in blocks[number + 1 :]), str(block)

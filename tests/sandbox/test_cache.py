import asyncio

import pytest

from prefect_flux_kontext.sandbox.references import SharedCache

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class Maker:
    """Makes bytes of a given size, and counts how often."""

    def __init__(self):
        self.made = []

    def of(self, key, size=1):
        async def make():
            await asyncio.sleep(1)
            self.made.append(key)
            return bytes(size)

        return make


@pytest.fixture
def maker():
    return Maker()


async def test_a_thing_is_made_once_for_all_who_ask(maker):
    cache = SharedCache(10, len)
    await asyncio.gather(*(cache.get("a", maker.of("a")) for _ in range(5)))
    await cache.get("a", maker.of("a"))
    assert maker.made == ["a"]


async def test_the_least_recently_used_goes_first(maker):
    cache = SharedCache(10, len)
    for key in ("a", "b", "a", "c", "a", "b"):
        await cache.get(key, maker.of(key, 5))
    assert maker.made == ["a", "b", "c", "b"]


async def test_value_larger_than_the_cache_is_not_kept(maker):
    cache = SharedCache(10, len)
    await cache.get("small", maker.of("small"))
    assert len(await cache.get("large", maker.of("large", 11))) == 11
    assert (cache.peek("small"), cache.peek("large")) == (bytes(1), None)


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(maker):
    async def fail():
        await asyncio.sleep(1)
        raise OSError("gone")

    cache = SharedCache(10, len)
    outcomes = await asyncio.gather(
        cache.get("a", fail), cache.get("a", fail), return_exceptions=True
    )
    assert [str(outcome) for outcome in outcomes] == ["gone", "gone"]
    assert await cache.get("a", maker.of("a")) == bytes(1)


async def test_cancelled_caller_does_not_cancel_the_others(maker):
    cache = SharedCache(10, len)
    first = asyncio.ensure_future(cache.get("a", maker.of("a")))
    second = asyncio.ensure_future(cache.get("a", maker.of("a")))
    await asyncio.sleep(0.5)
    first.cancel()
    assert await second == bytes(1)

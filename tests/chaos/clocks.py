"""Batches whose processes have wrong, jumping clocks, and a service whose clock is wrong."""

from tests.chaos.trials import finish

_DAY, _HOUR = 86_400, 3_600
_CLOCKS = (
    (0, -_DAY),
    (_DAY, _DAY),
    (_HOUR, -_HOUR),
    (-_DAY, _HOUR),
)
_FAULTS = (
    "status:skewed-clock=0.5",
    "submit:lost-reply=0.01",
    "submit:unavailable=0.01",
    "download:unavailable=0.02",
    "task:lost-result=0.05",
)


CLOCK_CASES = 2 * len(_CLOCKS)


def wrong_clocks(factory, line, rng, number, *, rows=200):
    """Run with clocks off by up to a day, and kill or end each run; the last clock is right."""
    clock = _CLOCKS[number % len(_CLOCKS)]
    factory.inject_faults(rng, _FAULTS)
    batch = factory.create_batch(rows)
    for other in rng.sample(_CLOCKS, 3):
        batch.run_and_kill(rng.uniform(0.3, 3), clock=other)
    finish(line, batch, 3, clock=clock)

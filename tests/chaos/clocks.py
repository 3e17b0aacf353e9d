"""Batches whose processes see wrong clocks, which jump, beside a service whose clock is wrong."""

from tests.chaos.trials import finish, tell

_DAY, _HOUR = 86_400, 3_600
_CLOCKS = (
    (0, -_DAY),
    (_DAY, _DAY),
    (_HOUR, -_HOUR),
    (-_DAY, _HOUR),
)
_WEATHER = (
    "status:skewed-clock=0.5",
    "submit:lost-reply=0.01",
    "submit:unavailable=0.01",
    "download:unavailable=0.02",
    "task:lost-result=0.05",
)


def wrong_clocks(place, line, dice, scale, *, rows=500):
    """Each run sees another clock, by up to a day, and is killed or ends; the last sees none."""
    for clock in _CLOCKS:
        place.weather(dice, _WEATHER)
        batch = place.batch(round(rows * scale))
        for other in dice.sample(_CLOCKS, 3):
            batch.run_and_kill(dice.uniform(0.3, 3), clock=other)
        finish(line, batch, 3, clock=clock)
        tell(f"    a clock off by {clock[0]:+} s, then {clock[1]:+} s; so far {line}")

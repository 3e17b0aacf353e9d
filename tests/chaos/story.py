"""A random batch with random troubles, made of a seed: what the simulation runs thousands of."""

import asyncio
import random

from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.simulation import checked, in_process, manifest, simulate
from tests.chaos.world import DISK, WIRE, Faults


def story(seed):
    """Live through the seed's troubles, finish without any, and check.

    Returns:
        The findings, with what went wrong in `problems`; the number of kills; the decisions.
    """
    dice = random.Random(f"story {seed}")
    prompts = [f"seed {seed} row {n}" for n in range(dice.randint(1, 9))]
    if dice.random() < 0.3:
        prompts.append(f"seed {seed} nsfw")
    lines = [(f"r{n}", prompt) for n, prompt in enumerate(prompts)]
    lines += [(f"again{n}", dice.choice(prompts)) for n in range(dice.choice((0, 0, 1, 3)))]
    dice.shuffle(lines)
    faults = Faults(
        {name: dice.choice((0, 0, 0.02, 0.1, 0.3)) for name in WIRE},
        {name: dice.choice((0, 0, 0, 0.02, 0.2)) for name in DISK},
    )
    settings = SandboxSettings(
        mean=dice.choice((0.5, 3, 20)), long_edge=16, fail_rate=dice.choice((0, 0, 0.2))
    )
    rounds = dice.randint(1, 4)

    async def main(world):
        return await _live(world, dice, lines, faults, rounds)

    return simulate(main, seed, faults, settings)


async def _live(world, dice, lines, faults, rounds):
    kills = 0
    for _ in range(rounds):
        runs = []
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            lives = dice.choice((0.3, 2, 8, 40, 900)) * dice.random()
            shown = [line for line in lines if dice.random() < dice.choice((0.6, 1))]
            runs.append(
                in_process(
                    world,
                    lives,
                    manifest(dice.sample(shown, len(shown))),
                    stops=dice.random() < 0.3,
                    only_collect=dice.random() < 0.2,
                    resubmit=dice.random() < 0.1,
                    retry=dice.random() < 0.1,
                )
            )
        kills += sum(outcome is None for outcome in await asyncio.gather(*runs))
        found = await checked(world, lines, complete=False)
        if found.problems:
            return found, kills, world.log
    faults.wire.clear()
    faults.disk.clear()
    for _ in range(2):
        last = await in_process(world, None, manifest(lines))
        posts = world.posts
    found = await checked(world, lines)
    if isinstance(last, BaseException):
        found.problems.append(f"the last run ended with {last!r}")
    again = await in_process(world, None, manifest(lines))
    if world.posts != posts:
        found.problems.append(f"a finished batch paid for {world.posts - posts} more: {again}")
    return found, kills, world.log

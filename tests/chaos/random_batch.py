"""A random batch with random faults, made from a seed; the simulation runs thousands of them."""

import asyncio
import random

from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.environment import DISK_FAULTS, NETWORK_FAULTS, Faults
from tests.chaos.simulation import check_environment, in_process, manifest, simulate


def run_random_batch(seed):
    """Run a batch under the seed's faults, finish it without faults, and check it.

    Returns:
        The findings with their `problems`, the number of kills, and the log of decisions.
    """
    rng = random.Random(f"story {seed}")
    prompts = [f"seed {seed} row {n}" for n in range(rng.randint(1, 9))]
    if rng.random() < 0.3:
        prompts.append(f"seed {seed} nsfw")
    lines = [(f"r{n}", prompt) for n, prompt in enumerate(prompts)]
    lines += [(f"again{n}", rng.choice(prompts)) for n in range(rng.choice((0, 0, 1, 3)))]
    rng.shuffle(lines)
    faults = Faults(
        {name: rng.choice((0, 0, 0.02, 0.1, 0.3)) for name in NETWORK_FAULTS},
        {name: rng.choice((0, 0, 0, 0.02, 0.2)) for name in DISK_FAULTS},
    )
    settings = SandboxSettings(
        mean=rng.choice((0.5, 3, 20)), long_edge=16, fail_rate=rng.choice((0, 0, 0.2))
    )
    rounds = rng.randint(1, 4)

    async def main(env):
        return await _run_rounds(env, rng, lines, faults, rounds)

    return simulate(main, seed, faults, settings)


async def _run_rounds(env, rng, lines, faults, rounds):
    kills = 0
    for _ in range(rounds):
        runs = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            lives = rng.choice((0.3, 2, 8, 40, 900)) * rng.random()
            shown = [line for line in lines if rng.random() < rng.choice((0.6, 1))]
            runs.append(
                in_process(
                    env,
                    lives,
                    manifest(rng.sample(shown, len(shown))),
                    stops=rng.random() < 0.3,
                    only_collect=rng.random() < 0.2,
                    resubmit=rng.random() < 0.1,
                    retry=rng.random() < 0.1,
                )
            )
        kills += sum(outcome is None for outcome in await asyncio.gather(*runs))
        found = await check_environment(env, lines, complete=False)
        if found.problems:
            return found, kills, env.log
    faults.network.clear()
    faults.disk.clear()
    for _ in range(2):
        last = await in_process(env, None, manifest(lines))
        posts = env.posts
    found = await check_environment(env, lines)
    if isinstance(last, BaseException):
        found.problems.append(f"the last run ended with {last!r}")
    again = await in_process(env, None, manifest(lines))
    if env.posts != posts:
        found.problems.append(f"a finished batch paid for {env.posts - posts} more: {again}")
    return found, kills, env.log

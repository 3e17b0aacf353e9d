"""Flows can be pickled with the types of their parameters, as `serve` does."""

import subprocess
import sys

import cloudpickle
import pytest

from prefect_flux_kontext import flows
from prefect_flux_kontext.orchestration.partitions.flow import style_transfer_partition

UNPICKLE = """
import sys, cloudpickle
flow = cloudpickle.loads(sys.stdin.buffer.read())
given = dict.fromkeys(flow.parameters.required or (), "text")
rare = {"cadence": {"interval": 1}}
given |= {"advanced": rare} if "advanced" in flow.parameters.properties else rare
if "partition" in given:
    given["partition"] = {"number": 1, "of": 2}
print(sorted(flow.validate_parameters(given)))
"""


@pytest.mark.parametrize(
    "flow",
    [
        *(getattr(flows, name) for name in flows.__all__ if name != "AdvancedOptions"),
        style_transfer_partition,
    ],
)
def test_pickled_flow_knows_its_parameters(flow):
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        input=cloudpickle.dumps(flow),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "'output'" in done.stdout.decode()

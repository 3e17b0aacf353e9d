"""Callbacks that are lost, doubled, late, reordered and forged, with killed processes."""

import random

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.callback_batches import all_callback_faults
from tests.chaos.trials import BatchFactory, Totals


def test_callback_faults_neither_lose_nor_pay_rows_twice(tmp_path):
    settings = SandboxSettings(mean=0.5, long_edge=16, callback_delay_scale=0.02)
    with running_sandbox(settings) as service:
        line = Totals()
        all_callback_faults(
            BatchFactory(tmp_path, service, None), line, random.Random(1), 0, rows=50, kills=2
        )
        assert not line.broken()
        assert line.rows == 50

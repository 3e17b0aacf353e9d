"""Callbacks that are lost, doubled, late, overtaken and forged, at once, with kills."""

import random

from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.chaos.called import all_callback_faults
from tests.chaos.trials import BatchFactory, Totals


def test_whatever_befalls_callbacks_no_row_is_paid_twice_or_lost(tmp_path):
    settings = SandboxSettings(mean=0.5, long_edge=16, callback_delay_scale=0.02)
    with running_sandbox(settings) as service:
        line = Totals()
        all_callback_faults(
            BatchFactory(tmp_path, service), line, random.Random(1), 1, batches=1, rows=50, kills=2
        )
        assert not line.broken()
        assert line.rows == 50

"""Metrics and traces with OpenTelemetry's SDK, and nothing without it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx
import pytest

from prefect_flux_kontext import telemetry
from prefect_flux_kontext.manifest.reader import Manifest
from prefect_flux_kontext.sandbox.server import running_sandbox
from prefect_flux_kontext.sandbox.settings import SandboxSettings
from tests.support.batches import KEY, run
from tests.support.postgres import find_free_port

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "examples" / "telemetry" / "dashboard.json"

with_sdk = pytest.mark.skipif(not telemetry.IS_ENABLED, reason="needs the extra `telemetry`")
without_sdk = pytest.mark.skipif(telemetry.IS_ENABLED, reason="the SDK is installed")


async def count():
    return 1


@without_sdk
@pytest.mark.parametrize(
    "decorate",
    [
        telemetry.trace("x"),
        telemetry.count_requests,
        telemetry.measure_row,
        telemetry.measure_storing,
    ],
)
def test_function_stays_as_it_is_without_the_sdk(decorate):
    assert decorate(count) is count


@without_sdk
def test_opentelemetry_is_not_imported_without_the_sdk():
    script = (
        "import sys, prefect_flux_kontext.telemetry, prefect_flux_kontext.batch.row; "
        "print(any(name.startswith('opentelemetry.') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_dashboard_shows_only_metrics_that_exist():
    """Prometheus appends the unit to a name, and `_total` to a counter's."""
    source = Path(telemetry.__file__).read_text()
    names = set(re.findall(r'_meter\.create_\w+\(\s*f"\{_NAME\}\.([\w.]+)"', source))
    shown = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            shown |= set(re.findall(r"flux_kontext_(\w+)", target["expr"]))
    ends = re.compile(r"(_USD|_bytes|_seconds)?(_total|_bucket)?$")
    assert {ends.sub("", name).replace("_", ".") for name in shown} == names


def set_up_sdk():
    """Set up the SDK for this process, and return what it measures and traces."""
    api, sdk = "opentelemetry", "opentelemetry.sdk"
    module = pytest.importorskip
    reader = module(f"{sdk}.metrics.export").InMemoryMetricReader()
    spans = module(f"{sdk}.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    module(f"{api}.metrics").set_meter_provider(module(f"{sdk}.metrics").MeterProvider([reader]))
    provider = module(f"{sdk}.trace").TracerProvider()
    provider.add_span_processor(module(f"{sdk}.trace.export").SimpleSpanProcessor(spans))
    module(f"{api}.trace").set_tracer_provider(provider)
    return reader, spans


def read_metrics(reader):
    """Return the sum of each metric's values, or its count, by name and attributes."""
    found = defaultdict(float)
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    labels = tuple(sorted(point.attributes.items()))
                    value = point.count if hasattr(point, "count") else point.value
                    found[metric.name.removeprefix("flux_kontext."), labels] += value
    return found


@with_sdk
@pytest.mark.anyio
async def test_batch_is_measured_and_traced(tmp_path):
    reader, spans = set_up_sdk()
    rows = [{"id": f"row-{n}", "prompt": f"a lighthouse {n}"} for n in range(4)]
    rows += [{"id": "dear", "prompt": "a tower", "mode": "max"}, {"id": "rude", "prompt": "nsfw"}]
    with running_sandbox(SandboxSettings(mean=0.1, long_edge=64, api_key=KEY)) as sandbox:
        await run(sandbox, Manifest(rows), str(tmp_path))
    found = read_metrics(reader)
    pro, dear = (("mode", "pro"),), (("mode", "max"),)
    assert found["rows", (("state", "stored"),)] == 5
    assert found["rows", (("state", "failed"),)] == 1
    assert found["cost", pro] == pytest.approx(0.15)
    assert found["cost", dear] == pytest.approx(0.06)
    assert found["requests", (("kind", "submit"), ("outcome", "ok"))] == 6
    assert found["requests", (("kind", "poll"), ("outcome", "ok"))] >= 6
    assert (found["generation", pro], found["waiting", dear]) == (4, 1)
    assert found["outstanding", pro] == 0
    assert found["stored", pro] == sum(path.stat().st_size for path in tmp_path.glob("row-*"))
    assert ("slots.used", ()) in found

    traces = defaultdict(list)
    for span in spans.get_finished_spans():
        traces[span.context.trace_id].append(span)
    steps = Counter(
        tuple(sorted(span.name.partition(".")[2] for span in row)) for row in traces.values()
    )
    before = ("claim", "row", "slot", "submit", "wait")
    assert steps == {tuple(sorted((*before, "download", "store"))): 5, before: 1}
    shown = [(span.attributes, span.status.description) for row in traces.values() for span in row]
    for word in ("lighthouse", "task_", "row-", "http", KEY):
        assert word not in str(shown)


SCRAPING = """
scrape_configs:
  - job_name: flux-kontext
    scrape_interval: 1s
    static_configs:
      - targets: ["127.0.0.1:{}"]
"""


@with_sdk
@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_queries_of_the_dashboard_have_values_in_prometheus(tmp_path):
    """As docs/telemetry.md says, with a service that refuses some of the submits."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,prompt\n" + "".join(f"r{n},a tower {n}\n" for n in range(60)))
    exporter, port = find_free_port(), find_free_port()
    settings = SandboxSettings(mean=2, long_edge=64, slots=8, api_key=KEY)
    (tmp_path / "prometheus.yml").write_text(SCRAPING.format(exporter))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml"]
    command += [f"--storage.tsdb.path={tmp_path}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    environment = os.environ | {
        "FLUX_KONTEXT_API_KEY": KEY,
        "FLUX_KONTEXT_CONCURRENT_TASKS": "12",
        "FLUX_KONTEXT_POLL_INITIAL_DELAY": "1",
        "FLUX_KONTEXT_POLL_INTERVAL": "0.5",
        "OTEL_METRICS_EXPORTER": "prometheus",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_EXPORTER_PROMETHEUS_PORT": str(exporter),
    }
    instrument = Path(sys.executable).with_name("opentelemetry-instrument")
    batch = [sys.executable, "-m", "prefect_flux_kontext", "run", manifest, tmp_path / "out"]
    with (
        running_sandbox(settings) as sandbox,
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as prometheus,
    ):
        try:
            began = time.time()
            environment["FLUX_KONTEXT_BASE_URL"] = sandbox.url
            subprocess.run([instrument, *batch], env=environment, check=True)
            queries = list_queries()
            assert len(queries) == 13
            for query in queries:
                assert read_values(port, query, began), query
        finally:
            prometheus.terminate()


def list_queries():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def read_values(port, query, began):
    """Return the values of a query in the time since a batch began, as Grafana requests them."""
    reply = httpx.get(
        f"http://127.0.0.1:{port}/api/v1/query_range",
        params={
            "query": query.replace("$__rate_interval", "10s"),
            "start": began,
            "end": time.time(),
            "step": 1,
        },
    )
    series = reply.raise_for_status().json()["data"]["result"]
    return [value for each in series for _, value in each["values"] if value != "NaN"]

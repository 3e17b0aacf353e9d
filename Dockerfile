# A worker of a Prefect process pool, and an image for the flow runs of other pools:
#
#   docker build --tag flux-kontext .
#   docker run --init --stop-timeout 60 --env PREFECT_API_URL --env FLUX_KONTEXT_API_KEY flux-kontext
#
# docs/containers.md describes both.

# 3.13.15-slim-trixie, the digest of its index of platforms
FROM python:3.13-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285 AS build
WORKDIR /src
COPY constraints.txt hatch_build.py LICENSE README.md pyproject.toml ./
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --constraint constraints.txt hatchling \
 && python -m venv /opt/flux-kontext
COPY prefect_flux_kontext prefect_flux_kontext
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/flux-kontext/bin/pip install --no-cache-dir --constraint constraints.txt \
    "$(echo /dist/*.whl)[parquet,s3]"

FROM python:3.13-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285
RUN useradd --create-home --uid 1000 flux
COPY --from=build /opt/flux-kontext /opt/flux-kontext
# Prefect kills a flow run 30 seconds after its SIGTERM; replies under way are recorded before.
ENV PATH="/opt/flux-kontext/bin:$PATH" \
    PYTHONUNBUFFERED=1 \
    FLUX_KONTEXT_STOP_TIMEOUT=25
USER 1000
WORKDIR /home/flux
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
CMD ["prefect", "worker", "start", "--pool", "flux-kontext", "--type", "process", "--with-healthcheck"]

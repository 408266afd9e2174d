# Builds everything in one image and carries the virtual environment into a small one without a compiler.
# Pinned by the digest of its index, so that the same file makes the same image. It is 3.11.16 of September 2026; for a
# newer one put here what `docker buildx imagetools inspect python:3.11-slim-bookworm` says.
ARG PYTHON=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY clients clients
COPY protos protos
# torch's CPU build is a tenth of its CUDA build: name an index that has it with
# --build-arg PIP_OPTIONS='--extra-index-url ...'.
ARG PIP_OPTIONS=
RUN python -m venv /opt/polygraft \
    && /opt/polygraft/bin/pip install --no-cache-dir -c constraints.txt $PIP_OPTIONS '.[server]' \
    # For every instruction set that a machine may have: the small image has no compiler.
    && /opt/polygraft/bin/python -m polygraft.layers.native.build --here

FROM ${PYTHON}
# torch's wheels bring their own OpenMP runtime, and the operators share it.
# A volume takes its owner from the folder it is mounted on; without one it would be root's.
RUN useradd --create-home --uid 10001 polygraft \
    && mkdir -p /adapters /home/polygraft/.cache/polygraft \
    && chown -R polygraft /adapters /home/polygraft/.cache
COPY --from=build /opt/polygraft /opt/polygraft
COPY docker/healthcheck.py /usr/local/bin/healthcheck.py
USER polygraft
ENV PATH=/opt/polygraft/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 50051 9464
# Beyond loopback a token is needed: give it as POLYGRAFT_ADMIN_TOKEN at run time, never in the image.
ENV POLYGRAFT_LISTEN=0.0.0.0:50051 POLYGRAFT_METRICS=0.0.0.0:9464 POLYGRAFT_ADAPTERS=/adapters
VOLUME ["/adapters", "/home/polygraft/.cache/polygraft"]
# The first start fetches and converts the default model, if no other is asked for.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "/usr/local/bin/healthcheck.py"]
ENTRYPOINT ["polygraft", "serve"]

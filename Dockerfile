# Builds everything in one image and carries the virtual environment into a small one without a compiler.
# Pinned by the digest of its index, so that the same file makes the same image. It is 3.11.16 of September 2026; for a
# newer one put here what `docker buildx imagetools inspect python:3.11-slim-bookworm` says.
ARG PYTHON=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt LICENSE ./
COPY docs/package.md docs/package.md
COPY adapters adapters
COPY server server
COPY clients clients
COPY protos protos
# cpu or cuda: which build of torch to install. The CPU build is a tenth of the other and isn't on the default package
# index: TORCH_INDEX is the address of PyTorch's own index of CPU wheels, as its installation page gives it.
# Without it the build stops instead of installing 5 GB of CUDA.
ARG TORCH=cpu
ARG TORCH_INDEX=
# Anything else for pip, such as --index-url.
ARG PIP_OPTIONS=
RUN python -m venv /opt/polygraft \
    && version=$(sed -n 's/^torch==//p' constraints.txt) \
    && case "$TORCH" in \
        cpu) [ -n "$TORCH_INDEX$PIP_OPTIONS" ] \
            || { echo "TORCH_INDEX is empty: set it to PyTorch's index of CPU wheels, or TORCH to cuda" >&2; exit 1; }; \
            torch="torch==$version+cpu" ;; \
        cuda) torch="torch==$version" ;; \
        *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 1 ;; \
    esac \
    && /opt/polygraft/bin/pip install --no-cache-dir -c constraints.txt $PIP_OPTIONS \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" '.[server]' \
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

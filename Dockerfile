# Four images, chosen by --target: scheduler (no torch in it), worker-cpu, worker-cuda, client. docker-compose.yml builds those that
# it needs. Versions come from constraints.txt; everything runs as user 10001, writes to /tmp, /var/cache/carousel (kernels, models of
# the hub) and /var/lib/carousel (journal) only, and needs no other place to be writable.

ARG PYTHON=3.11
# An index of PyTorch's wheels for this worker; empty: pip's own settings are enough.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_CUDA_INDEX=

# ------------------------------------------------------------------------------------------------------------ what is installed

FROM python:${PYTHON}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/image.py ./

# The project itself, once for all images.
FROM build AS wheel
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt
COPY LICENSE README.md ./
COPY protos/ protos/
COPY kvcache/ kvcache/
COPY scheduler/ scheduler/
COPY worker/ worker/
COPY client/ client/
COPY bench/ bench/
RUN pip wheel --no-deps --wheel-dir /wheel .

# What the scheduler and the client need.
FROM build AS service
RUN python image.py requirements tracing > requirements.txt \
 && python -m venv --without-pip /opt/carousel \
 && pip --python /opt/carousel/bin/python install -c constraints.txt -r requirements.txt \
 && python image.py finish /opt/carousel
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/carousel/bin/python install --no-deps --no-index /wheel/*.whl \
 && python image.py finish /opt/carousel

# What a worker needs: torch first, it is by far the largest.
FROM build AS cpu
ARG TORCH_CPU_INDEX
RUN python image.py requirements tracing worker > requirements.txt \
 && python -m venv --without-pip /opt/carousel \
 && pip --python /opt/carousel/bin/python install -c constraints.txt ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} torch \
 && pip --python /opt/carousel/bin/python install -c constraints.txt -r requirements.txt \
 && python image.py finish /opt/carousel
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/carousel/bin/python install --no-deps --no-index /wheel/*.whl \
 && python image.py finish /opt/carousel
# The compiled loops, for the processor that builds; another one compiles them again at its first start.
RUN NUMBA_CACHE_DIR=/var/cache/carousel/numba /opt/carousel/bin/python -c 'from worker import compiled; compiled.compile_all()'

# The same with CUDA: Triton is the one that torch asks for, and a compiler is there for the stubs through which it launches.
FROM build AS cuda
ARG TORCH_CUDA_INDEX
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python image.py requirements tracing worker > requirements.txt \
 && grep -v '^triton==' constraints.txt > versions.txt \
 && python -m venv --without-pip /opt/carousel \
 && pip --python /opt/carousel/bin/python install -c versions.txt ${TORCH_CUDA_INDEX:+--extra-index-url "$TORCH_CUDA_INDEX"} torch triton \
 && pip --python /opt/carousel/bin/python install -c versions.txt -r requirements.txt \
 && python image.py finish /opt/carousel
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip --python /opt/carousel/bin/python install --no-deps --no-index /wheel/*.whl \
 && python image.py finish /opt/carousel
# The stubs are linked against the driver's library, which a machine without a GPU has not: its name is enough. KERNELS_FOR is a
# folder of this project with the config.json of the model to be served; others are compiled when they are first loaded.
ARG KERNELS_FOR=demo/model
ARG CAPABILITIES="80 89 90"
COPY ${KERNELS_FOR}/config.json /model/config.json
RUN mkdir /stub && gcc -shared -o /stub/libcuda.so.1 -x c /dev/null \
 && for capability in ${CAPABILITIES}; do \
      TRITON_CACHE_DIR=/var/cache/carousel/triton TRITON_LIBCUDA_PATH=/stub LD_LIBRARY_PATH=/stub \
      /opt/carousel/bin/python -m worker.gpu.precompile --model /model --capability "$capability" --max-model-len 1024 --stubs || exit 1; \
    done

# ------------------------------------------------------------------------------------------------------------------ what is run

FROM python:${PYTHON}-slim AS runtime
RUN useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin carousel \
 && install -d -o carousel -g carousel -m 700 /keys /keys/core /keys/worker /var/cache/carousel /var/lib/carousel
ENV PATH=/opt/carousel/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONSAFEPATH=1 \
    HF_HOME=/var/cache/carousel/huggingface \
    NUMBA_CACHE_DIR=/var/cache/carousel/numba \
    TRITON_CACHE_DIR=/var/cache/carousel/triton
WORKDIR /tmp
USER 10001:10001

FROM runtime AS client
COPY --from=service /opt/carousel /opt/carousel
ENTRYPOINT ["carousel"]
CMD ["--help"]

FROM runtime AS scheduler
COPY --from=service /opt/carousel /opt/carousel
COPY demo/model/ /model/
EXPOSE 50051 7000 9464
# grpc.health.v1; a server with TLS wants --tls-ca here, too.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
  CMD ["carousel", "health", "--timeout", "3"]
ENTRYPOINT ["carousel", "serve"]
CMD ["--help"]

# Workers listen to nobody: the core counts their heartbeats.
FROM runtime AS worker-cpu
COPY --from=cpu /opt/carousel /opt/carousel
COPY --from=cpu --chown=10001:10001 /var/cache/carousel /var/cache/carousel
COPY demo/model/ /model/
ENTRYPOINT ["python", "-m", "worker"]
CMD ["--help"]

FROM runtime AS worker-cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda /opt/carousel /opt/carousel
COPY --from=cuda --chown=10001:10001 /var/cache/carousel /var/cache/carousel
COPY demo/model/ /model/
ENTRYPOINT ["python", "-m", "worker"]
CMD ["--help"]

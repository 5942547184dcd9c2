# Two images out of one file: `--target api` (without torch) and `--target worker` (GPU and io).
# Packages come from requirements.lock with their hashes checked; torch's CUDA libraries are among them, so a GPU host
# needs its driver and the container toolkit, nothing else.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
WORKDIR /source
COPY requirements.lock pyproject.toml ./
# uv is in the lock itself; pip installs its lines alone, uv everything else.
RUN awk '/^[^ #]/ {ours = /^uv==/} ours' requirements.lock > uv.lock \
    && pip install --quiet --no-cache-dir --no-deps --require-hashes -r uv.lock

FROM build AS wheel
RUN uv pip install --quiet --system --constraint requirements.lock hatchling
COPY README.md ./
COPY api api
COPY cli cli
COPY migrations migrations
COPY shared shared
COPY worker worker
RUN python -m hatchling build -t wheel -d /wheel

FROM build AS api-packages
RUN uv venv --quiet /opt/maskline \
    && uv pip install --quiet --python /opt/maskline --constraint requirements.lock \
        --requirement pyproject.toml --extra api
COPY --from=wheel /wheel /wheel
RUN uv pip install --quiet --python /opt/maskline --no-deps /wheel/*.whl

FROM build AS worker-packages
RUN uv venv --quiet /opt/maskline \
    && uv pip install --quiet --python /opt/maskline --constraint requirements.lock \
        --requirement pyproject.toml --extra worker
COPY --from=wheel /wheel /wheel
RUN uv pip install --quiet --python /opt/maskline --no-deps /wheel/*.whl

FROM python:${PYTHON}-slim AS runtime
RUN useradd --uid 10001 --create-home maskline && install -d -o maskline -g maskline /models
ENV PATH=/opt/maskline/bin:$PATH PYTHONUNBUFFERED=1 MASKLINE_LOG_FORMAT=json
USER maskline
WORKDIR /home/maskline

FROM runtime AS api
COPY --from=api-packages /opt/maskline /opt/maskline
EXPOSE 8000
CMD ["uvicorn", "--factory", "api.main:create_app", "--host", "0.0.0.0", "--port", "8000", \
     "--no-access-log", "--timeout-graceful-shutdown", "20"]

FROM runtime AS worker
COPY --from=worker-packages /opt/maskline /opt/maskline
# A volume here keeps the weights; the home folder has what the libraries put aside on their own.
ENV MASKLINE_MODELS__CACHE_FOLDER=/models
VOLUME /models
CMD ["celery", "--quiet", "-A", "worker.app", "worker", "-P", "prefork", "-c", "1", "-Q", "gpu", \
     "--without-gossip", "--without-mingle", "-n", "gpu@%h"]

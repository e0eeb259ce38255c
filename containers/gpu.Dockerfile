# Serves a bundle on an NVIDIA GPU. The CUDA libraries come with the Python packages; the host brings the driver and the
# NVIDIA container toolkit. From the repository's root:
#   docker build -f containers/gpu.Dockerfile -t ccnet:gpu .
#   docker run --rm --gpus 1 -p 127.0.0.1:8000:8000 -e CCNET_TOKEN -v "$PWD/bundle:/bundle:ro" ccnet:gpu
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
# There is no compiler in this image: the build backend brings one for the kernels.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
# constraints.txt holds versions that were tested on CPUs.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    for wheel in /wheels/*.whl; do pip install --no-cache-dir "${wheel}[gpu,serve]"; done \
    && useradd --uid 10001 --create-home ccnet
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
EXPOSE 8000
ENTRYPOINT ["ccnet"]
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]

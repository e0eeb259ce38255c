# Serves a bundle on a CPU. From the repository's root:
#   docker build -f containers/cpu.Dockerfile -t ccnet:cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 -e CCNET_TOKEN -v "$PWD/bundle:/bundle:ro" ccnet:cpu
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
# There is no compiler in this image: the build backend brings one for the kernels.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    for wheel in /wheels/*.whl; do \
        pip install --no-cache-dir --constraint /constraints.txt "${wheel}[cpu,openvino,serve]"; \
    done \
    && useradd --uid 10001 --create-home ccnet
USER 10001
EXPOSE 8000
ENTRYPOINT ["ccnet"]
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]

# vssm's command line on the CPU, to run exports: classify, evaluate, verify bundles.
#   docker build --tag vssm .
#   docker run --rm --volume "$PWD:/data" vssm run out picture.png
# The first stage builds the wheel and installs it with the versions of constraints.txt; the second
# has Python and the result alone: no compiler, no sources, no pip cache. docs/container.md says more.
ARG PYTHON_IMAGE=python:3.12.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt \
      build scikit-build-core cmake ninja
COPY CHANGELOG.md CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY examples/cpp examples/cpp
COPY examples/serving examples/serving
COPY examples/web examples/web
COPY exporter exporter
COPY plugins plugins
RUN python -m build --no-isolation --outdir /wheel -Ccmake.define.VSSM_CUDA=OFF
# More than the core, such as EXTRAS=[predict,coco].
ARG EXTRAS=""
RUN python -m venv --without-pip /opt/vssm \
 && set -- /wheel/*.whl \
 && python -m pip --python /opt/vssm/bin/python install --no-cache-dir \
      --only-binary :all: --constraint constraints.txt "$1${EXTRAS}"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/vssm /opt/vssm
RUN useradd --uid 10001 --no-create-home --home-dir /data vssm
ENV PATH=/opt/vssm/bin:$PATH
WORKDIR /data
USER 10001
ENTRYPOINT ["vssm"]
CMD ["--help"]

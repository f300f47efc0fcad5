# The broker and its Envoy in one image: `broker serve` is the processor, `envoy` the data plane, each in a container of its own.
#
#     docker build --tag envoy-tool-broker:0.1.0 .
#
# The base is Debian 13.7 of 2026-09-18, named by the digest of the index of all its architectures: a tag may be moved, this may not.
# Instructions are those that BuildKit and the builder before it both take.
ARG BASE_IMAGE=debian:trixie-20260918-slim@sha256:a99cfc517144bc59b1978475ec53b46ecabec7e43635402ee5b77cc54cd1b20a

# What both stages have, so that Python is the same in both.
FROM ${BASE_IMAGE} AS python
RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

FROM python AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv
# pip stands beside what it installs, so that the image gets the one without the other.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/broker
COPY requirements.txt /src/
# Wheels alone: nothing of a dependency runs while the image is made.
RUN /opt/pip/bin/pip --python /opt/broker install --require-hashes --only-binary :all: --requirement /src/requirements.txt
COPY LICENSE README.md pyproject.toml /src/
COPY broker /src/broker
RUN /opt/pip/bin/pip --python /opt/broker install --no-build-isolation --no-deps /src \
 && /opt/pip/bin/pip --python /opt/broker uninstall --yes setuptools

FROM python
ARG VERSION=
LABEL org.opencontainers.image.title="Envoy tool broker" \
      org.opencontainers.image.description="The one way out for AI agents: Envoy, and the processor that decides." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The folders' owner is who runs here: a new volume that is mounted there is laid out as they are.
RUN groupadd --gid 10001 broker \
 && useradd --uid 10001 --gid broker --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin broker \
 && install --directory --mode 0700 --owner broker --group broker /var/lib/broker /run/broker
COPY --from=builder /opt/broker /opt/broker
# The root may be read-only: state, sockets and /tmp are what is written.
ENV PATH=/opt/broker/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
# Of a processor. A container that runs Envoy has another, or none (compose/compose.yaml).
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:15003/healthz', timeout=4)"]
CMD ["broker", "serve", "--manifests", "/etc/broker/manifests", "--state", "/var/lib/broker", "--admin", "0.0.0.0:15003"]

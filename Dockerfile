FROM python:3.12-slim

RUN useradd --create-home --uid 10001 mqserve && install --directory --owner=mqserve --mode=0700 /var/lib/mqserve/results

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mqserve mqserve
COPY broker broker
COPY proxy proxy
COPY replicas replicas
COPY controller controller
# with RE2, so that the image's proxies match every route
RUN pip install --no-cache-dir '.[re2]' && rm -rf build

USER mqserve
WORKDIR /home/mqserve

# A stop drains first: see stop_grace_period in compose.yaml.
STOPSIGNAL SIGTERM
ENTRYPOINT ["mqserve"]
CMD ["--help"]

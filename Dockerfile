# The plugin as one of Vault's containerized plugins. It builds from nothing but its
# context, which "make docker" fills: no registry, so an air-gapped site can build it.
FROM scratch
# Files come first: after any other step Docker's older builder takes the image for one of
# its own architecture. The plugin is first of all: what is the same for two architectures
# that builder would take from its cache for the wrong one, and fail.
COPY vault-plugin-secrets-openai /vault-plugin-secrets-openai
# Where Go looks for the authorities that vouch for OpenAI.
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
ARG VERSION=""
LABEL org.opencontainers.image.title="vault-plugin-secrets-openai" \
      org.opencontainers.image.description="HashiCorp Vault secrets engine for OpenAI" \
      org.opencontainers.image.licenses="MPL-2.0" \
      org.opencontainers.image.version="$VERSION"
# Nobody in particular: Vault adds its own group, which may write the folder of the socket
# that it mounts. An engine without root maps the container's root to the user that runs
# Vault, and nobody else can write that folder: build for it with CONTAINER_USER=0:0.
ARG CONTAINER_USER=65532:65532
USER $CONTAINER_USER
ENTRYPOINT ["/vault-plugin-secrets-openai"]

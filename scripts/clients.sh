#!/usr/bin/env bash
# Installs the real clients that drive the examples in the tests: curl, wrk, h2load, redis-cli,
# redis-benchmark and redis-server, openssl, and a headless Chromium with its driver; and what the
# tests of the documents use, jq and Python with yaml. Safe to run again; a test whose client is
# missing says so and why. grpcurl is used where it is installed; Debian has no package of it.
set -euo pipefail

declare -A packages=(
    [curl]=curl [wrk]=wrk [h2load]=nghttp2-client [redis-cli]=redis-tools
    [redis-server]=redis-server [openssl]=openssl [chromium]=chromium [chromedriver]=chromium-driver
    [python3]=python3 [jq]=jq
)
missing=()
for program in "${!packages[@]}"; do
    command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
python3 -c 'import yaml' 2>/dev/null || missing+=(python3-yaml)
if [ "${#missing[@]}" -eq 0 ]; then
    echo "clients: all there"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "clients: missing, to be installed with your package manager: ${missing[*]}" >&2
    exit 1
fi
sudo=$([ "$(id -u)" -eq 0 ] || echo sudo)
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update --quiet
$sudo apt-get install --yes --quiet --no-install-recommends "${missing[@]}"
echo "clients: installed ${missing[*]}"

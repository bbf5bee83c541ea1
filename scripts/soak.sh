#!/usr/bin/env bash
# Churns a server for so many minutes, ten by default, with clients that vanish, are slow,
# half-close, reset, flood, come in crowds or behave well, and holds the books against the kernel at
# the end.
#
#   scripts/soak.sh [MINUTES]
#
# The test is tests/soak.rs, which says what is asserted; eight seconds of it run in `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes=${1:-10}
case $minutes in
'' | *[!0-9]* | 0*) echo "soak: MINUTES is a whole number of at least 1, not '$minutes'" >&2; exit 2 ;;
esac

# In units of eight seconds, rounded up.
export RING_TEST_LONG=$(((minutes * 60 + 7) / 8))
echo "soak: about $minutes min, RING_TEST_LONG=$RING_TEST_LONG"
exec cargo test --release --test soak -- --nocapture

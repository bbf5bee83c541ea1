#!/usr/bin/env bash
#
# Measures slipring beside its peers: builds benches/peers and runs the whole matrix.
#
#   scripts/compare.sh [--peers FEATURE,..] [--quick] [--rounds 5] [--seconds 1] [--rows KEY,..]
#                      [--servers NAME,..] [--out DIR] [--server-cpu 0] [--load-cpu 1]
#
#   --peers      Build these peers only (Cargo features of benches/peers); slipring, the minimal
#                loop and plain epoll are always there.
#   --quick      One short round of everything, to see that it works. No results.
#   the others   See benches/peers/README.md.
#
# Results go to benches/results/DATE. Two CPUs are needed, and nothing else may run on them: with
# five rounds of a second it takes about 20 minutes.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
target=${CARGO_TARGET_DIR:-$root/target}
features=()
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --peers)
        [ $# -ge 2 ] || { echo "compare: --peers needs a list such as tokio,monoio" >&2; exit 2; }
        features=(--no-default-features --features "$2")
        shift
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

# ntex asks for a newer compiler than it needs.
CARGO_TARGET_DIR=$target/peers cargo build --release --ignore-rust-version --bins \
    --manifest-path "$root/benches/peers/Cargo.toml" "${features[@]}"
exec "$target/peers/release/compare" "${arguments[@]}"

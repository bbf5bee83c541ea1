#!/usr/bin/env bash
# The library with each feature alone, and everything without any, compile without a warning; with all
# of them clippy sees everything in .ci/run. scripts/release.sh also runs the tests of each.
#
#   scripts/features.sh [--list]
#
# With --list it only prints the features' names.
set -euo pipefail
cd "$(dirname "$0")/.."

# The names between [features] and the next table.
features=$(sed -n '/^\[features\]$/,/^\[[^f]/s/^\([a-z0-9-]*\) = \[.*/\1/p' Cargo.toml | grep -vx default)
[ -n "$features" ] || { echo "features: Cargo.toml has none" >&2; exit 1; }
if [ "${1:-}" = --list ]; then
    echo "$features"
    exit
fi

check() {
    echo "features: $*"
    cargo clippy --quiet "$@" -- -D warnings
}

check --lib --tests --examples
for feature in $features; do
    check --features "$feature" --lib
done

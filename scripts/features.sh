#!/usr/bin/env bash
# Each feature alone, none, and all together: what it adds, its own tests and its examples compile
# without a warning. The other tests are the same whatever the features, so they are compiled twice
# only: without any, and with all.
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
    own=$(grep -lE "^#!\[cfg\(.*feature = \"$feature\"" tests/*.rs || true)
    only=()
    for test in $own; do only+=(--test "$(basename "$test" .rs)"); done
    check --features "$feature" --lib --examples "${only[@]}"
    # With the unit tests.
    check --features "$feature" --lib --profile test
done
check --all-features --lib --tests --examples

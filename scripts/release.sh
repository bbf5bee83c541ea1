#!/usr/bin/env bash
# Holds a release against what it promises; it publishes and tags nothing. `.ci/run` comes before it.
#
#   scripts/release.sh [--dry-run]
#
# In this order, and the first failure ends it: the tree is clean; the changelog has the version, with
# a date; the version has no tag yet; the package has what it should and builds by itself; the
# documentation of all features builds without a warning; each feature alone and all together compile
# and pass their tests; and the interface keeps semantic versioning against the last tag, by
# cargo-semver-checks, which is installed where it is missing.
#
# With --dry-run the state of the tree, the changelog and the tags is told, and not insisted on.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

dry=
case ${1:-} in
'') ;;
--dry-run) dry=1 ;;
*) echo "release: expected --dry-run or nothing, not '$1'" >&2; exit 2 ;;
esac

# The tests that a feature brings, a line for each program, with the module if it is not all of it.
tests_of() {
    local main program
    for main in tests/*/main.rs; do
        program=$(basename "$(dirname "$main")")
        grep -A1 -xF "#[cfg(feature = \"$1\")]" "$main" | sed -n "s/^mod \(.*\);/$program \1::/p"
    done
    grep -A2 -xF '[[test]]' Cargo.toml | grep -B1 -xF "required-features = [\"$1\"]" |
        sed -n 's/^name = "\(.*\)"/\1/p'
}

step() { printf '\n==> %s\n' "$1"; }

# Ends it, unless it is a dry run.
insist() {
    echo "release: $1" >&2
    [ -n "$dry" ] || exit 1
}

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
echo "release: $version"

step "tree, changelog and tags"
[ -z "$(git status --porcelain)" ] || insist "the tree has changes that are not committed"
entry=$(grep -E "^## \[?${version//./\\.}\]?( |$)" CHANGELOG.md || true)
[ -n "$entry" ] || insist "CHANGELOG.md has no section for $version"
grep -qE '[0-9]{4}-[0-9]{2}-[0-9]{2}' <<<"$entry" ||
    insist "CHANGELOG.md gives $version no date: '$entry'"
if git rev-parse --quiet --verify "refs/tags/v$version" >/dev/null; then
    insist "v$version is tagged already"
fi

step "package"
scripts/package.sh
# Unpacks it and builds it there, with nothing that is not in it.
cargo package --locked ${dry:+--allow-dirty}

step "documentation of all features"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

step "features: each compiles"
scripts/features.sh

# The tests that only a feature brings, those of the library, and of the documentation. What takes
# several features is run with all of them.
for feature in $(scripts/features.sh --list); do
    step "tests of the feature $feature alone"
    # An example may be what a test runs.
    cargo build --quiet --examples --no-default-features --features "$feature"
    cargo test --no-default-features --features "$feature" --lib
    tests_of "$feature" | while read -r program module; do
        # shellcheck disable=SC2086 # Without a module there is no argument.
        cargo test --no-default-features --features "$feature" --test "$program" -- $module </dev/null
    done
    cargo test --no-default-features --features "$feature" --doc
done

step "tests without and with all features"
cargo test
cargo test --workspace --all-features

step "semantic versioning"
# Of the versions before this one, the last.
last=$(git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null || true)
if [ -z "$last" ]; then
    echo "release: NOT CHECKED: no version is tagged yet, so there is nothing to compare with"
else
    cargo semver-checks --version >/dev/null 2>&1 || cargo install cargo-semver-checks --locked
    cargo semver-checks --all-features --baseline-rev "$last"
fi

printf '\nrelease: %s is fit%s\n' "$version" "${dry:+, but for what is said above}"

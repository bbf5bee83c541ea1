#!/usr/bin/env bash
#
# Compares this checkout, as it is, with a commit: the same questions, put to both in turn.
#
#   scripts/regress.sh [COMMIT] [--rounds 7] [--seconds 1] [--rows KEY,..] [--server-cpu 0]
#                      [--load-cpu 1]
#
#   COMMIT       What it is compared with; the parent of HEAD, or HEAD where there are changes.
#   the others   See benches/peers/README.md.
#
# Two CPUs are needed, and nothing else may run on them. Without --rows it asks those of the
# server's CPU, about a minute each with seven rounds of a second. The table's "before" is 1.00.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
target=${CARGO_TARGET_DIR:-$root/target}/regress
commit=
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    commit=$1
    shift
elif [ -n "$(git -C "$root" status --porcelain)" ]; then
    commit=HEAD
else
    commit=HEAD^
fi
commit=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") || {
    echo "regress: $commit is no commit; name one that git knows" >&2
    exit 2
}
rows=(--rows c8-64b,c64-64b,c64-4k,c16-64k,c64-p16,churn)
case " $* " in *" --rows "*) rows=() ;; esac
rounds=(--rounds 7)
case " $* " in *" --rounds "*) rounds=() ;; esac

tree=$target/tree
build() {
    CARGO_TARGET_DIR=$1 cargo build --release --quiet --no-default-features --bins \
        --manifest-path "$2/benches/peers/Cargo.toml"
}
drop_tree() { git -C "$root" worktree remove --force "$tree" 2> "$target/worktree.txt" || true; }
mkdir -p "$target"
drop_tree
trap drop_tree EXIT
git -C "$root" worktree add --quiet --detach --force "$tree" "$commit"
build "$target/before" "$tree"
build "$target/now" "$root"
echo "before: $(git -C "$root" log -1 --format='%h %s' "$commit")"
"$target/now/release/compare" --before "$target/before/release/serve" --out "$target/results" \
    "${rows[@]}" "${rounds[@]}" "$@"

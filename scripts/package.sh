#!/usr/bin/env bash
# What `cargo package` would publish: everything that a user of the package needs, and nothing else.
#
#   scripts/package.sh
set -euo pipefail
cd "$(dirname "$0")/.."

listed=$(cargo package --list --allow-dirty)
# Files that something in the package names, or that its users look for.
needed="Cargo.toml README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE src/lib.rs src/sys/uring.rs
tests/tidy/rules.rs tests/README.md"
tracked=$(git ls-files -- 'examples/*' ':!examples/apps' 'docs/*' 'src/*.rs' 2>/dev/null || true)
for file in $needed $tracked; do
    grep -qxF -- "$file" <<<"$listed" || { echo "package: it lacks $file" >&2; exit 1; }
done
if grep -E '^(\.ci|scripts|target)/' <<<"$listed"; then
    echo "package: it has files that are of no use to others" >&2
    exit 1
fi
echo "package: $(wc -l <<<"$listed") files"

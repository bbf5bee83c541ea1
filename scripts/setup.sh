#!/usr/bin/env bash
# Sets a fresh machine up: what a build needs beside Rust, and the crates. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cc >/dev/null; then
    echo "setup: no C linker; installing gcc"
    if command -v apt-get >/dev/null; then
        sudo=$([ "$(id -u)" -eq 0 ] || echo sudo)
        $sudo apt-get update
        $sudo apt-get install --yes gcc libc6-dev
    else
        echo "setup: install gcc or clang with your package manager, then run this again" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null; then
    echo "setup: no Rust; install 1.88 or later from https://rustup.rs, then run this again" >&2
    exit 1
fi
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
found=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n%s\n' "$needed" "$found" | sort -V | head -n 1)" != "$needed" ]; then
    echo "setup: Rust $found found, $needed needed; run: rustup update stable" >&2
    exit 1
fi

cargo fetch --locked
echo "setup: ready, with Rust $found"

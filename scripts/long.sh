#!/usr/bin/env bash
# Runs every test that has a long form, optimized, as many times longer as its scenario wants, and
# ends with a table of what became of each: half an hour or so on two CPUs.
#
#   scripts/long.sh [NAME...]
#
# With names it runs only those files of tests, such as `turns/idle_race`; `lib` is the simulator.
set -uo pipefail
cd "$(dirname "$0")/.."

# Program and file of tests, factor (RING_TEST_LONG), what the scenario wants.
plan='
turns/retire 10 a hundred rounds (S2)
turns/stop_accept 5 forty stops (S3)
turns/idle_race 10 ten thousand trials (S9, S10)
turns/many 2 as many connections as descriptors allow, at most 50 000 (S16)
turns/deadlines 10 ten thousand slow clients (S46)
data/reuse 50 a million connections (S54)
soak 23 three minutes (S66); scripts/soak.sh runs longer
lib 3 three times the seeds
data/cases 5 rounds of all cases
turns/fairness 1 with the ratio that is promised of an optimized build (S63, C9)
turns/overload 5 rounds at the limits (S61, C7)
processes/servers 3 restarts and kills (S26, S34, C38)
descriptors/restart 5 restarts (S25)
turns/sigterm 5 signals (S20)
storms 5 storms of signals and wakes (C32, C37)
runtime/wake 5 lost wakes
'

table=()
failed=0
while read -r file factor what; do
    [ -n "$file" ] || continue
    if [ $# -gt 0 ] && [[ " $* " != *" $file "* ]]; then
        continue
    fi
    echo "long: $file, RING_TEST_LONG=$factor: $what"
    case $file in
    lib) target=(--lib sim::) ;;
    */*) target=(--test "${file%/*}" "${file#*/}::") ;;
    *) target=(--test "$file") ;;
    esac
    begun=$SECONDS
    result=ok
    # Tests that measure time take turns within their program.
    if ! RING_TEST_LONG=$factor cargo test --release "${target[@]}" </dev/null; then
        result=failed
        failed=1
    fi
    table+=("$(printf '%-18s %6s  %-6s %7s' "$file" "$factor" "$result" $((SECONDS - begun)))")
done <<<"$plan"

if [ ${#table[@]} -eq 0 ]; then
    echo "long: no such test: $*" >&2
    exit 2
fi
printf '\n%-18s %6s  %-6s %7s\n' test factor result seconds
printf '%s\n' "${table[@]}"
exit $failed

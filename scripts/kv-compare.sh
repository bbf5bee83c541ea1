#!/usr/bin/env bash
#
# Measures the kv example beside redis-server, each on one core, with redis-benchmark on the other
# CPU: requests a second, and the server's CPU time per request.
#
#   scripts/kv-compare.sh [--rounds 5] [--seconds 2] [--server-cpu 0] [--load-cpu 1] [--out DIR]
#
# For each command and pipeline the two take turns, so that whatever else slows the machine slows
# both. Rounds are as many requests as fit into the seconds. Two CPUs are needed, and nothing else
# may run on them: with five rounds it takes about ten minutes. A line a round goes to DIR/raw.csv,
# the medians to DIR/README.md; DIR is benches/results/DATE-kv.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
rounds=5 seconds=2 server_cpu=0 load_cpu=1 out=$root/benches/results/$(date +%F)-kv
while [ $# -gt 1 ]; do
    case $1 in
    --rounds) rounds=$2 ;;
    --seconds) seconds=$2 ;;
    --server-cpu) server_cpu=$2 ;;
    --load-cpu) load_cpu=$2 ;;
    --out) out=$2 ;;
    *) echo "kv-compare: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
[ $# -eq 0 ] || { echo "kv-compare: $1 needs a value" >&2; exit 2; }
for program in redis-server redis-benchmark redis-cli; do
    command -v $program > /dev/null || { echo "kv-compare: $program is not installed" >&2; exit 2; }
done
for number in "$rounds" "$seconds"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || { echo "kv-compare: $number: no whole number" >&2; exit 2; }
done

cargo build --release --example kv --manifest-path "$root/Cargo.toml"
kv=${CARGO_TARGET_DIR:-$root/target}/release/examples/kv
kv_port=17379 redis_port=17380
mkdir -p "$out"

SLIPRING_LISTEN=127.0.0.1:$kv_port SLIPRING_CPUS=$server_cpu "$kv" > "$out/kv.log" &
kv_pid=$!
taskset -c "$server_cpu" redis-server --port $redis_port --bind 127.0.0.1 --save '' \
    --appendonly no > "$out/redis.log" &
redis_pid=$!
trap 'kill $kv_pid $redis_pid 2> /dev/null || true' EXIT
for port in $kv_port $redis_port; do
    for try in $(seq 100); do
        redis-cli -p $port ping > /dev/null 2>&1 && break
        [ "$try" -lt 100 ] || { echo "kv-compare: nobody answers on port $port" >&2; exit 1; }
        sleep 0.1
    done
done

# CPU time of all threads in nanoseconds: sched-stats in the kernel's documentation.
cpu_ns() {
    cat "/proc/$1"/task/*/schedstat | awk '{ ns += $1 } END { printf "%.0f", ns }'
}

# The requests of a command, as redis-benchmark takes them. Keys are chosen among 100 000, and what
# GET, MGET and LPOP ask for is there.
declare -A asks=(
    [ping]="-t ping_mbulk"
    [set]="-r 100000 -t set"
    [get]="-r 100000 -t get"
    [incr]="-r 100000 -t incr"
    [lpush]="-t lpush"
    [lpop]="-t lpop"
    [mget]="-r 100000 mget key:__rand_int__ key:__rand_int__ key:__rand_int__ key:__rand_int__"
    [lrange]="lrange mylist 0 99"
)

# measure NAME PORT PID COMMAND PIPELINE REQUESTS: requests a second, microseconds of CPU for each.
measure() {
    local before after rate
    before=$(cpu_ns "$3")
    # shellcheck disable=SC2086 # These are words.
    rate=$(taskset -c "$load_cpu" redis-benchmark -p "$2" -c 50 -P "$5" -n "$6" --csv \
        ${asks[$4]} 2> /dev/null | tail -1 | awk -F'","' '{ print $2 }')
    after=$(cpu_ns "$3")
    awk -v name="$1" -v command="$4" -v pipeline="$5" -v requests="$6" -v rate="$rate" \
        -v ns=$((after - before)) 'BEGIN {
            printf "%s,%s,%d,%d,%.0f,%.3f\n", name, command, pipeline, requests, rate,
                ns / 1000 / requests }'
}

raw=$out/raw.csv
echo "server,command,pipeline,requests,requests_per_s,cpu_us_per_request" > "$raw"
for pipeline in 1 16; do
    for command in ping set get incr mget lpush lpop lrange; do
        for server in "$kv_port $kv_pid" "$redis_port $redis_pid"; do
            # What is to be read, and a first look at the pace.
            # shellcheck disable=SC2086 # It is two words.
            case $command in
            get | mget) measure - $server set 16 200000 ;;
            lpop) measure - $server lpush 16 $((50000 * rounds * seconds)) ;;
            lrange)
                redis-cli -p "${server% *}" del mylist
                measure - $server lpush 16 1000
                ;;
            esac > /dev/null
        done
        pace=$(measure - $redis_port $redis_pid $command $pipeline 20000 | cut -d, -f5)
        requests=$((pace * seconds))
        for _ in $(seq "$rounds"); do
            measure kv $kv_port $kv_pid $command $pipeline $requests | tee -a "$raw"
            measure redis $redis_port $redis_pid $command $pipeline $requests | tee -a "$raw"
        done
    done
done

{
    echo "# kv beside redis-server, $(date +%F)"
    echo
    echo "One core each, 50 connections, medians of $rounds alternating rounds of about $seconds s:" \
        "\`scripts/kv-compare.sh --rounds $rounds --seconds $seconds\`."
    echo
    echo "- machine: $(nproc) CPUs, $(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1)," \
        "$(systemd-detect-virt 2> /dev/null || echo "a virtual machine or not: unknown")"
    echo "- kernel: $(uname -sr | cut -d- -f1); $(redis-server --version | cut -d' ' -f1-3)"
    echo "- slipring: $(git -C "$root" describe --always --dirty 2> /dev/null || echo unknown)"
    echo "- load average at the end: $(cut -d' ' -f1-3 /proc/loadavg)"
    echo
    echo "| command | pipelined | kv, requests/s | redis, requests/s | kv, CPU us each |" \
        "redis, CPU us each | CPU, kv to redis |"
    echo "|---|---|---|---|---|---|---|"
    tail -n +2 "$raw" | sort -t, -k3,3n -k2,2 -k1,1 | awk -F, '
        function median(list, n,    i, j, held) {
            for (i = 2; i <= n; i++)
                for (j = i; j > 1 && list[j - 1] > list[j]; j--) {
                    held = list[j]; list[j] = list[j - 1]; list[j - 1] = held
                }
            return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
        }
        function flush() {
            if (!n) return
            rates[server] = median(rate, n); cpus[server] = median(cpu, n); n = 0
            if (server == "redis")
                printf "| %s | %d | %.0f | %.0f | %.2f | %.2f | %.2f |\n", command, pipeline,
                    rates["kv"], rates["redis"], cpus["kv"], cpus["redis"],
                    cpus["kv"] / cpus["redis"]
        }
        { if ($1 != server || $2 != command || $3 != pipeline) flush()
          server = $1; command = $2; pipeline = $3; n++; rate[n] = $5 + 0; cpu[n] = $6 + 0 }
        END { flush() }'
} > "$out/README.md"
rm -f "$out/kv.log" "$out/redis.log"
cat "$out/README.md"

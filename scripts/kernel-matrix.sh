#!/usr/bin/env bash
#
# Runs the test suite in other kernels than this machine's: boots Debian's cloud kernels under
# qemu's software emulation, with an initramfs of busybox, the test executables and their libraries.
#
#   scripts/kernel-matrix.sh [--short] [--release] [--refresh] [--kernels "6.1 6.12 5.10"]
#                            [-- ARGUMENT...]
#
#   --short      Only 6.1, the library's unit tests and the integration tests in SHORT_TESTS below,
#                as .ci/run builds them: with all features, so that it finds them built.
#   --release    Build with the release profile: a longer build, shorter runs.
#   --refresh    Fetch the newest package of each kernel, even if one is cached.
#   --kernels    Which kernels. On one older than 6.1 no test runs; there `examples/echo` must
#                refuse to start, with a message that names the kernel and 6.1.
#   ARGUMENT...  Goes to each test executable after `--test-threads=2`, for example a name filter.
#
# Verdicts, one line each: `MATRIX <kernel> <executable> ok|FAILED(<code>|timeout)`. The exit code
# is 0 only if each boot came to its end without a failure and ran at least one test.
#
# In the guest the tests find the repository's files and the executables at the paths they have
# here, CARGO_MANIFEST_DIR, RING_TEST_EXAMPLES (where the examples are) and RING_TEST_SLOW=10
# (emulation: scale time limits). They run as root with unlimited memlock, so a permission failure
# can't show, and the guest says nothing about speed. Documentation tests don't run there.
#
# Settings from the environment, in seconds: MATRIX_TEST_LIMIT_S, the time limit of one executable
# (600), and MATRIX_BOOT_LIMIT_S, until the guest speaks (120).
#
# Packages are cached in ${XDG_CACHE_HOME:-$HOME/.cache}/slipring-kernels. A linux-image-*.deb that
# was put there by hand is as good, on a machine whose apt reaches no Debian mirror.
set -euo pipefail
export LC_ALL=C

# Integration tests of the short form, as PROGRAM:MODULE.
SHORT_TESTS=(data:calls descriptors:resets)
# The first kernel on which the library has to start.
FLOOR=6.1
# Loaded in the guest where they aren't built in, with what they depend on. IPv6, unix sockets and
# network namespaces are built in. 5.10's cloud kernel has no tls.
MODULES=(veth sch_netem inet_diag tcp_diag tls gcm ghash-generic ctr)
# Under emulation with two threads a guest sometimes runs into a breakpoint that the kernel sets
# while it patches its own code: most often in the early boot, seldom later. Such a boot is repeated.
BOOTS_MAX=3
EMULATION_CRASH='int3: 0000 \[#'
INITRD_MIB_MAX=640

say() { printf 'kernel-matrix: %s\n' "$*"; }
die() {
    printf 'kernel-matrix: error: %s\n' "$*" >&2
    exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
init=$root/scripts/kernel-matrix/init
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slipring-kernels
logs=${CARGO_TARGET_DIR:-$root/target}/kernel-matrix
test_limit_s=${MATRIX_TEST_LIMIT_S:-600}
boot_limit_s=${MATRIX_BOOT_LIMIT_S:-120}
work=
qemu_pid=

clean_up() {
    if [ -n "$qemu_pid" ]; then
        kill -KILL "$qemu_pid" 2>/dev/null || true
        wait "$qemu_pid" 2>/dev/null || true
    fi
    [ -z "$work" ] || rm -rf "$work"
}

# --- The command line and the tools ---------------------------------------------------------------

read_arguments() {
    short=false release=false refresh=false kernels_given=
    while [ $# -gt 0 ]; do
        case $1 in
        --short) short=true ;;
        --release) release=true ;;
        --refresh) refresh=true ;;
        --kernels)
            [ $# -ge 2 ] || die "--kernels needs a list such as \"6.1 6.12\""
            kernels_given=$2
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        *) die "unknown argument '$1' (--help lists them; a test filter goes after --)" ;;
        esac
        shift
    done
    test_arguments=("$@")
    if [ -n "$kernels_given" ]; then
        read -ra kernels <<<"$kernels_given"
    elif $short; then
        kernels=(6.1)
    else
        kernels=(6.1 6.12 5.10)
    fi
    [ ${#kernels[@]} -gt 0 ] || die "--kernels is empty"
    local kernel
    for kernel in "${kernels[@]}"; do
        [[ $kernel =~ ^[0-9]+\.[0-9]+$ ]] || die "kernel '$kernel' isn't of the form 6.1"
    done
    [[ $test_limit_s =~ ^[1-9][0-9]*$ ]] || die "MATRIX_TEST_LIMIT_S='$test_limit_s' is no number"
    [[ $boot_limit_s =~ ^[1-9][0-9]*$ ]] || die "MATRIX_BOOT_LIMIT_S='$boot_limit_s' is no number"
}

check_tools() {
    [ "$(uname -sm)" = "Linux x86_64" ] || die "the guests are Linux x86_64, this is $(uname -sm)"
    local -a packages=()
    local pair
    for pair in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio xz:xz-utils \
        ldd:libc-bin dpkg-deb:dpkg apt-get:apt; do
        if ! type -P "${pair%%:*}" >/dev/null; then
            printf 'kernel-matrix: missing tool: %s\n' "${pair%%:*}" >&2
            packages+=("${pair##*:}")
        fi
    done
    busybox=$(type -P busybox || true)
    if [ -n "$busybox" ] && ldd "$busybox" >/dev/null 2>&1; then
        say "$busybox is linked dynamically, and the guest needs the static one" >&2
        packages+=(busybox-static)
    fi
    [ ${#packages[@]} -eq 0 ] || die "install with: apt-get install ${packages[*]}"
    type -P cargo >/dev/null || die "missing tool: cargo (install the Rust toolchain)"
    [ -f "$init" ] || die "missing file: $init"
}

is_older() { # is_older A B: A is an older version than B
    [ "$1" != "$2" ] && [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# --- The kernels ----------------------------------------------------------------------------------

# The Debian mirrors that apt is configured with, as `main <uri>` and `security <uri>`.
debian_mirrors() {
    local names='(buster|bullseye|bookworm|trixie|forky|duke|(old){0,2}stable|testing|unstable|sid)'
    # The text is apt's format, not the shell's.
    # shellcheck disable=SC2016
    apt-get indextargets --no-release-info --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Identifier: Packages' |
        sed -nE "s#^([^ ]+) $names-security main\$#security \1#p;
                 s#^([^ ]+) $names(-updates|-backports)? main\$#main \1#p" | sort -u
}

# Where a kernel is looked for, best first: which mirror, and which suite there.
suites_of() {
    case $1 in
    5.10) echo security:bullseye-security main:bullseye ;;
    6.1) echo security:bookworm-security main:bookworm ;;
    6.12)
        echo security:trixie-security security:bookworm-security main:trixie \
            main:bookworm-backports
        ;;
    *) echo main:trixie-backports main:forky main:sid ;;
    esac
}

newest_cached() { # newest_cached KERNEL: prints a path, or nothing
    find "$cache" -maxdepth 1 -name "linux-image-$1.*-cloud-amd64_*.deb" | sort -V | tail -n 1
}

# Downloads the newest image of a kernel into the cache, with lists and settings of its own: apt's
# state on this machine stays as it is, and nothing needs root.
download_kernel() {
    local kernel=$1 mirrors tried='' pair uri suite package keyring
    local apt=$work/apt-$kernel fetched=$work/fetched-$kernel
    mirrors=$(debian_mirrors)
    [ -n "$mirrors" ] ||
        die "no Debian mirror in apt's sources: put a linux-image-$kernel.*-cloud-amd64_*.deb" \
            "into $cache by hand"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$fetched"
    # apt gives up root for a download and then needs a directory that its own user can write.
    if [ "$(id -u)" -eq 0 ] && id _apt >/dev/null 2>&1; then chown _apt "$fetched"; fi
    local -a options=(-qq
        -o "Dir::Etc::sourcelist=$apt/debian.sources" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$apt/lists" -o Dir::State::status=/dev/null
        -o "Dir::Cache=$apt/cache" -o Acquire::Languages=none
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
    for pair in $(suites_of "$kernel"); do
        suite=${pair#*:}
        while read -r uri; do
            {
                printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
                printf 'Architectures: amd64\n'
                [ ! -f "$keyring" ] || printf 'Signed-By: %s\n' "$keyring"
            } >"$apt/debian.sources"
            tried+=" '$suite'"
            if ! apt-get "${options[@]}" update >"$apt/update.log" 2>&1; then
                tried+=" ($(grep -m 1 '^E:' "$apt/update.log" || echo 'apt-get update failed'))"
                continue
            fi
            package=$(apt-cache "${options[@]}" search --names-only \
                "^linux-image-${kernel/./\\.}\..*-cloud-amd64\$" |
                sed 's/ .*//' | sort -V | tail -n 1)
            if [ -z "$package" ]; then
                tried+=" (has none)"
                continue
            fi
            say "downloading $package from $suite" >&2
            if (cd "$fetched" && apt-get "${options[@]}" download "$package" >&2); then
                mkdir -p "$cache"
                rm -f "$cache"/linux-image-"$kernel".*-cloud-amd64_*.deb
                mv "$fetched"/*.deb "$cache"
                return
            fi
            tried+=" (the download of $package failed)"
        done < <(sed -n "s/^${pair%%:*} //p" <<<"$mirrors")
    done
    die "no cloud kernel $kernel within apt's reach; tried$tried"
}

# Unpacks a kernel and packs its modules: $work/KERNEL/{vmlinuz,package,root/matrix/modules}.
prepare_kernel() {
    local kernel=$1 deb tree=$work/$1 name
    mkdir -p "$cache"
    deb=$(newest_cached "$kernel")
    if [ -z "$deb" ] || $refresh; then
        download_kernel "$kernel"
        deb=$(newest_cached "$kernel")
    fi
    mkdir -p "$tree/root/matrix/modules"
    dpkg-deb -x "$deb" "$tree/deb" ||
        die "cannot unpack $deb; remove it, or run again with --refresh"
    cp "$tree"/deb/boot/vmlinuz-* "$tree/vmlinuz"
    dpkg-deb -f "$deb" Package Version | sed 's/^[^ ]* //' | paste -sd ' ' >"$tree/package"
    modules_from=$(find "$tree/deb" -type d -path '*/lib/modules/*/kernel' | head -n 1)
    modules_from=${modules_from%/kernel}
    [ -n "$modules_from" ] || die "$deb holds no modules"
    : >"$tree/root/matrix/modules.list"
    for name in "${MODULES[@]}"; do
        add_module "$name" "$tree/root/matrix" || say "note: $kernel has no module $name"
    done
    rm -rf "$tree/deb"
}

# Adds a module after those that it depends on. The package has no modules.dep, so each module's own
# `depends=` is read.
add_module() { # add_module NAME DIRECTORY
    local pattern=${1//[-_]/[-_]} to=$2 file depends depend
    if grep -q "/$pattern\.ko\$" "$modules_from/modules.builtin" ||
        grep -q "^$pattern\.ko\$" "$to/modules.list"; then
        return 0
    fi
    file=$(find "$modules_from/kernel" -name "$pattern.ko*" | head -n 1)
    [ -n "$file" ] || return 1
    local ko=$to/modules/${file##*/}
    case $file in
    *.ko) cp "$file" "$ko" ;;
    *.ko.xz) ko=${ko%.xz} && xz -dc "$file" >"$ko" ;;
    *) die "cannot unpack the module $file" ;;
    esac
    depends=$(tr '\0' '\n' <"$ko" | sed -n 's/^depends=//p' | tr ',' ' ')
    for depend in $depends; do
        add_module "$depend" "$to" || die "the module $1 needs $depend, which isn't in the package"
    done
    echo "${ko##*/}" >>"$to/modules.list"
}

# --- The guest's files ----------------------------------------------------------------------------

# Reads cargo's messages: one line `kind<TAB>name<TAB>path` for each executable.
executables() {
    local kind='.*"target":\{"kind":\["([^"]*)"' name='.*"name":"([^"]*)","src_path"'
    local path='.*"executable":"([^"]+)".*'
    sed -nE "/\"reason\":\"compiler-artifact\"/s|$kind$name$path|\1\t\2\t\3|p"
}

build() {
    local -a options=() targets=(--lib --tests)
    local name kind path short_test
    if $release; then options=(--release); fi
    if $short; then options+=(--workspace --all-features); fi
    say "building the examples"
    cargo build "${options[@]}" --examples --message-format=json-render-diagnostics >"$work/build"
    executables <"$work/build" | awk -F '\t' '$1 == "example"' >"$work/examples"
    path=$(awk -F '\t' '$2 == "echo" { print $3 }' "$work/examples")
    [ -n "$path" ] || die "examples/echo isn't there"
    examples_dir=${path%/*}
    : >"$work/tests"
    $any_test_kernel || return 0

    if $short; then
        targets=(--lib)
        for short_test in "${SHORT_TESTS[@]}"; do
            [ -f "tests/${short_test/://}.rs" ] ||
                die "SHORT_TESTS names '$short_test', and there is no tests/${short_test/://}.rs:" \
                    "edit the script"
            targets+=(--test "${short_test%:*}")
        done
    fi
    say "building the tests"
    cargo test --no-run "${options[@]}" "${targets[@]}" \
        --message-format=json-render-diagnostics >"$work/build"
    # A `bin` that cargo builds for the integration tests is no test executable.
    grep '"test":true},' "$work/build" | executables | while IFS=$'\t' read -r kind name path; do
        case $kind in
        test) printf '%s\t%s\t%s\n' "$name" "$path" "$(short_filter "$name")" ;;
        bin) printf 'bin-%s\t%s\n' "$name" "$path" ;;
        example) printf 'example-%s\t%s\n' "$name" "$path" ;;
        *) printf 'lib\t%s\n' "$path" ;;
        esac
    done | sort >"$work/tests"
    [ -s "$work/tests" ] || die "cargo built no test executable"
}

# The filter that leaves of a program only what SHORT_TESTS names; nothing in the long form.
short_filter() { # short_filter PROGRAM
    local short_test
    if ! $short; then return 0; fi
    for short_test in "${SHORT_TESTS[@]}"; do
        [ "${short_test%:*}" != "$1" ] || printf '%s::' "${short_test#*:}"
    done
}

# Installs an executable and its libraries below a directory, at the paths they have here.
install_executable() { # install_executable PATH DIRECTORY
    local path=$1 to=$2 library
    mkdir -p "$to${path%/*}"
    # Debug information is most of an executable's size, and the guest's memory is small.
    if ! type -P strip >/dev/null || ! strip --strip-debug -o "$to$path" "$path" 2>/dev/null; then
        cp -L "$path" "$to$path"
    fi
    chmod 755 "$to$path"
    # ldd fails for a static executable, which needs nothing.
    { ldd "$path" 2>/dev/null || true; } |
        sed -nE 's#.*=> (/[^ ]+) .*#\1#p; s#^[[:space:]]*(/[^ ]+) \(.*#\1#p' |
        while IFS= read -r library; do
            [ ! -e "$to$library" ] || continue
            mkdir -p "$to${library%/*}"
            cp -L "$library" "$to$library"
        done
}

# The repository's own files, which tests read by their compiled-in path.
install_sources() { # install_sources DIRECTORY
    mkdir -p "$1$root"
    if git -c "safe.directory=$root" rev-parse --git-dir >/dev/null 2>&1; then
        git -c "safe.directory=$root" ls-files -z --cached --others --exclude-standard
    else
        say "note: no git work tree here; the guest gets all files outside target/" >&2
        find . -path ./target -prune -o -type f -print0
    fi | while IFS= read -r -d '' file; do
        # A file that is deleted but not yet committed is still listed.
        if [ -f "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done | cpio -0 -p -d -m --quiet "$1$root"
}

pack() { # pack DIRECTORY >ARCHIVE
    (cd "$1" && find . -print0 | cpio -0 -o -H newc -R 0:0 --quiet)
}

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

make_initramfs() {
    local base=$work/base tests=$work/with-tests name path kernel mode mib
    mkdir -p "$base"/{bin,etc,matrix,root} "$tests/matrix"
    cp "$busybox" "$base/bin/busybox"
    cp "$init" "$base/init"
    chmod 755 "$base/init" "$base/bin/busybox"
    printf '%s:/bin/sh\n' root:x:0:0:root:/root nobody:x:65534:65534:nobody:/ >"$base/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$base/etc/group"
    printf '127.0.0.1 localhost matrix\n::1 localhost\n' >"$base/etc/hosts"
    printf 'hosts: files\n' >"$base/etc/nsswitch.conf"
    # Libraries outside the standard directories are found through this.
    [ ! -f /etc/ld.so.cache ] || cp /etc/ld.so.cache "$base/etc/"
    while IFS=$'\t' read -r _ name path; do
        install_executable "$path" "$base"
    done <"$work/examples"
    pack "$base" >"$work/base.cpio"

    if $any_test_kernel; then
        install_sources "$tests"
        while IFS=$'\t' read -r name path _; do
            install_executable "$path" "$tests"
        done <"$work/tests"
        cp "$work/tests" "$tests/matrix/tests"
        : >"$tests/matrix/arguments"
        [ ${#test_arguments[@]} -eq 0 ] ||
            printf '%s\n' "${test_arguments[@]}" >"$tests/matrix/arguments"
        pack "$tests" >"$work/tests.cpio"
    fi

    for kernel in "${kernels[@]}"; do
        mode=$(mode_of "$kernel")
        {
            echo "KERNEL=$kernel MODE=$mode LIMIT_S=$test_limit_s"
            echo "ROOT=$(quote "$root")"
            echo "EXAMPLES=$(quote "$examples_dir")"
            # CARGO_TARGET_TMPDIR, as it is compiled into integration tests.
            echo "TARGET_TMP=$(quote "${examples_dir%/*/*}/tmp")"
        } >"$work/$kernel/root/matrix/config"
        pack "$work/$kernel/root" >"$work/$kernel/own.cpio"
        if [ "$mode" = test ]; then
            cat "$work/base.cpio" "$work/tests.cpio" "$work/$kernel/own.cpio"
        else
            cat "$work/base.cpio" "$work/$kernel/own.cpio"
        fi >"$work/$kernel/initrd"
        mib=$(($(stat -c %s "$work/$kernel/initrd") / 1048576))
        [ "$mib" -le "$INITRD_MIB_MAX" ] ||
            die "the initramfs has $mib MiB, more than $INITRD_MIB_MAX: try --release"
        say "$kernel: $(cat "$work/$kernel/package"), initramfs $mib MiB"
    done
}

mode_of() { if is_older "$1" "$FLOOR"; then echo refuse; else echo test; fi; }

# --- Boots ----------------------------------------------------------------------------------------

# Prints the verdicts that came since the last call; `shown` counts the lines. A line that is still
# half written has no newline and waits for the next call.
show_verdicts() { # show_verdicts VERDICTS
    local whole
    whole=$(wc -l <"$1")
    [ "$whole" -gt "$shown" ] || return 0
    sed -n "$((shown + 1)),${whole}p" "$1" | grep -v ' begin ' || true
    shown=$whole
}

# Boots a kernel once. Leaves its console's text and its verdicts in $logs.
boot() { # boot KERNEL CONSOLE VERDICTS
    local kernel=$1 console=$2 verdicts=$3 now started shown=0 limit_s extra=random.trust_cpu=on
    : >"$console"
    : >"$verdicts"
    limit_s=$((boot_limit_s + 120 + test_limit_s * $(wc -l <"$work/tests")))
    # -nodefaults leaves out devices that the guest doesn't need. `oops=panic` ends a boot at once
    # that would go on half dead, and with -no-reboot a panic ends qemu.
    qemu-system-x86_64 -accel tcg,thread=multi -smp 2 -m 2048 -nographic -no-reboot \
        -no-user-config -nodefaults -monitor none -cpu max \
        -serial "file:$console" -serial "file:$verdicts" \
        -kernel "$work/$kernel/vmlinuz" -initrd "$work/$kernel/initrd" \
        -append "console=ttyS0 loglevel=5 panic=-1 oops=panic rootfstype=tmpfs $extra" \
        </dev/null 8>&- &
    qemu_pid=$!
    started=$SECONDS
    while kill -0 "$qemu_pid" 2>/dev/null; do
        sleep 0.5
        show_verdicts "$verdicts"
        now=$((SECONDS - started))
        if [ "$now" -ge "$limit_s" ] ||
            { [ "$shown" -eq 0 ] && [ "$now" -ge "$boot_limit_s" ]; }; then
            say "$kernel: stopped after $now s"
            kill -KILL "$qemu_pid"
            break
        fi
    done
    # qemu's own exit code says nothing about the guest.
    wait "$qemu_pid" 2>/dev/null || true
    qemu_pid=
    show_verdicts "$verdicts"
}

# The end of the console's text that belongs to one executable; the log has all of it.
section() { # section CONSOLE NAME
    tr -d '\r' <"$1" | awk -v from="== $2: begin" -v to="== $2: exit" '
        index($0, from) == 1 { on = 1 }
        on { print }
        index($0, to) == 1 { on = 0 }' | tail -n 120 | cut -c 1-500
}

# Reads a boot's verdicts. Returns 0 for success, 1 for a failure, 2 if another boot may help.
judge() { # judge KERNEL CONSOLE VERDICTS
    local kernel=$1 console=$2 verdicts=$3 text name passed expected got
    text=$(cat "$verdicts")
    if grep -qE '(WARNING: CPU|BUG: |rcu.*stall|soft lockup)' "$console"; then
        say "$kernel: note: the kernel complains:"
        grep -E '(WARNING: CPU|BUG: |rcu.*stall|soft lockup)' "$console" | head -n 5
    fi
    if ! grep -q "^MATRIX $kernel end [0-9]" <<<"$text"; then
        if ! grep -q "^MATRIX $kernel begin " <<<"$text" ||
            grep -q "$EMULATION_CRASH" "$console"; then
            say "$kernel: the boot crashed or hung before its end; the last lines of its console:"
            tr -d '\r' <"$console" | tail -n 30
            return 2
        fi
        name=$(sed -n "s/^MATRIX $kernel begin //p" <<<"$text" | tail -n 1)
        section "$console" "$name"
        say "$kernel: FAILED: the guest died or hung in '$name'"
        return 1
    fi
    if grep -q "^MATRIX $kernel .* FAILED(" <<<"$text"; then
        while read -r name; do
            section "$console" "$name"
        done < <(sed -nE "s/^MATRIX $kernel ([^ ]+) FAILED\(.*/\1/p" <<<"$text")
        [ "$(mode_of "$kernel")" = test ] || tr -d '\r' <"$console" | sed -n '/^== echo: must/,$p'
        return 1
    fi
    if [ "$(mode_of "$kernel")" = refuse ]; then
        grep -q "^MATRIX $kernel refusal ok\$" <<<"$text" || return 1
        say "$kernel: the refusal says:"
        tr -d '\r' <"$console" | sed -n '/^== echo: must/,/^== echo: exit/p'
        return 0
    fi
    expected=$(wc -l <"$work/tests")
    got=$(grep -c "^MATRIX $kernel [^ ]* ok\$" <<<"$text" || true)
    if [ "$got" -ne "$expected" ]; then
        say "$kernel: FAILED: $got of $expected executables have a verdict"
        return 1
    fi
    passed=$(sed -nE 's/^test result: ok\. ([0-9]+) passed.*/\1/p' "$console" |
        awk '{ n += $1 } END { print n + 0 }')
    if [ "$passed" -eq 0 ]; then
        say "$kernel: FAILED: no test ran; does the filter match any?"
        return 1
    fi
    say "$kernel: $passed tests passed in $got executables"
}

run_kernel() {
    local kernel=$1 attempt outcome started console verdicts
    for ((attempt = 1; attempt <= BOOTS_MAX; attempt++)); do
        console=$logs/$kernel-$attempt.console
        verdicts=$logs/$kernel-$attempt.verdicts
        started=$SECONDS
        boot "$kernel" "$console" "$verdicts"
        outcome=0
        judge "$kernel" "$console" "$verdicts" || outcome=$?
        say "$kernel: boot $attempt took $((SECONDS - started)) s, log in $console"
        [ "$outcome" -eq 2 ] || return "$outcome"
    done
    say "$kernel: FAILED: no verdict from $BOOTS_MAX boots"
    return 1
}

main() {
    read_arguments "$@"
    check_tools
    # Cargo reads a relative CARGO_TARGET_DIR from where it is started.
    cd "$root"
    trap clean_up EXIT
    trap 'exit 130' INT TERM HUP
    work=$(mktemp -d "${TMPDIR:-/tmp}/kernel-matrix.XXXXXX")
    chmod 711 "$work"
    mkdir -p "$logs"
    exec 8>"$logs/lock"
    flock -n 8 || die "another run writes its logs into $logs"
    rm -f "$logs"/*.console "$logs"/*.verdicts

    local kernel
    local -a failed=()
    any_test_kernel=false
    for kernel in "${kernels[@]}"; do
        if [ "$(mode_of "$kernel")" = test ]; then any_test_kernel=true; fi
        prepare_kernel "$kernel"
    done
    build
    make_initramfs
    for kernel in "${kernels[@]}"; do
        run_kernel "$kernel" || failed+=("$kernel")
    done
    if [ ${#failed[@]} -gt 0 ]; then
        say "FAILED on: ${failed[*]}"
        exit 1
    fi
    say "ok on: ${kernels[*]}"
}

main "$@"

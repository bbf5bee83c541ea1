//! What surrounds a server and may be missing: system calls, locked memory, CPUs, `/proc` and
//! `/sys`. Each in a process of its own, which this binary is started as again.
//!
//! Not here, since a test would have to change the machine for them: `kernel.io_uring_disabled`,
//! and a cgroup's CPU quota. What is made of their values is tested in `src/refusal.rs` and
//! `src/machine.rs`.

use std::io::{Read, Write};

use crate::common::child::{self, again};
use crate::common::filter::refuse_everywhere;
use crate::common::{config, connect, first_cpus, not_run};
use slipring::{Config, Server};

/// Case 44. Each refusal of a sandbox or a kernel has its cause and its remedy in the error, and
/// the doctor says the same.
#[test]
fn a_refused_ring_is_an_error_that_says_why() {
    const TEST: &str = "a_refused_ring_is_an_error_that_says_why";
    if let Some(role) = child::role() {
        let (call, errno) = role.split_once(' ').expect("a call and an error");
        let number = |text: &str| text.parse::<i32>().expect("a number");
        refuse_everywhere(number(call).into(), number(errno));
        return say_how_a_start_goes(config());
    }
    let (setup, enter, register) =
        (libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register);
    let cases: [(libc::c_long, i32, &[&str]); 7] = [
        (setup, libc::ENOSYS, &["Unsupported", "Seccomp: 2", "io_uring_register"]),
        (setup, libc::EPERM, &["Unsupported", "Seccomp: 2", "Docker", "io_uring_setup"]),
        (setup, libc::EOPNOTSUPP, &["Unsupported", "sandbox"]),
        (setup, libc::EINVAL, &["Unsupported", "6.1"]),
        (setup, libc::ENOMEM, &["Resource", "memory"]),
        (enter, libc::EPERM, &["Unsupported", "Seccomp: 2", "io_uring_enter"]),
        (register, libc::EPERM, &["Unsupported", "Seccomp: 2", "io_uring_register"]),
    ];
    for (call, errno, parts) in cases {
        let (succeeded, words) = child::run(again(TEST, &format!("{call} {errno}"), &[]));
        let case = format!("{call} {}", std::io::Error::from_raw_os_error(errno));
        println!("{case}: {}", words.lines().find(|it| it.starts_with("start: ")).unwrap_or("?"));
        assert!(succeeded, "{case}: {words}");
        for who in ["start: ", "doctor: "] {
            let said = words.lines().find(|line| line.starts_with(who)).unwrap_or_default();
            for part in parts {
                assert!(said.contains(part), "{case}: {part:?} is not in {said:?}");
            }
        }
    }
}

/// Case 45. As many cores as the affinity mask has CPUs, one here.
#[test]
fn one_cpu_is_one_core() {
    const TEST: &str = "one_cpu_is_one_core";
    if child::role().is_some() {
        return say_how_a_start_goes(config());
    }
    let through = format!("exec taskset -c {} \"$0\" \"$@\"", first_cpus(1));
    let (succeeded, words) = child::run(again(TEST, "one", &["sh", "-c", &through]));
    assert!(succeeded && words.contains("start: served on 1 cores"), "{words}");
}

/// Case 46. The error's remedy, smaller rings, is one.
#[test]
fn little_locked_memory_is_an_error_or_enough_for_small_rings() {
    const TEST: &str = "little_locked_memory_is_an_error_or_enough_for_small_rings";
    const LIMIT: [&str; 3] = ["sh", "-c", "ulimit -l 64; exec \"$0\" \"$@\""];
    match child::role().as_deref() {
        Some("small") => {
            let small = config().cpus(&first_cpus(1)).sq_entries(8).cq_entries(64);
            return say_how_a_start_goes(small);
        }
        Some(_) => return say_how_a_start_goes(config()),
        None => {}
    }
    if let Some(words) = child::run_as_nobody(TEST, again(TEST, "default", &LIMIT))
        && !words.contains("start: served")
    {
        for part in ["Resource", "RLIMIT_MEMLOCK is 65536 bytes", "102400 bytes", "LimitMEMLOCK="] {
            assert!(words.contains(part), "{part:?} is not in: {words}");
        }
    }
    if let Some(words) = child::run_as_nobody(TEST, again(TEST, "small", &LIMIT)) {
        assert!(words.contains("start: served on 1 cores"), "{words}");
    }
}

/// Case 48. What can't be read there is not known, and is no reason not to serve.
#[test]
fn a_server_starts_without_proc_and_sys_or_where_they_are_read_only() {
    const TEST: &str = "a_server_starts_without_proc_and_sys_or_where_they_are_read_only";
    if let Some(role) = child::role() {
        let is_there = std::path::Path::new("/proc/self/comm").exists();
        assert_eq!(is_there, role == "read-only");
        assert!(std::fs::write("/proc/self/comm", "x").is_err());
        return say_how_a_start_goes(Config::default().connections_max(100));
    }
    let read_only = "mount --rbind -o ro /proc /proc && mount --rbind -o ro /sys /sys \
        && mount -o remount,bind,ro /proc && mount -o remount,bind,ro /sys";
    let hidden = "mount -t tmpfs none /proc && mount -t tmpfs none /sys";
    for (name, mounts) in [("read-only", read_only), ("hidden", hidden)] {
        let through = format!("{mounts} || exit 99; exec \"$0\" \"$@\"");
        // As root, or in a user namespace.
        let ways: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];
        let tried = ways.map(|way| {
            let through = [&["unshare"], way, &["sh", "-c", &through]].concat();
            child::run(again(TEST, name, &through))
        });
        match tried.iter().find(|(_, words)| words.contains("running 1 test")) {
            Some((succeeded, words)) => {
                assert!(*succeeded && words.contains("start: served on"), "{name}: {words}");
            }
            None => not_run(TEST, format!("{name} /proc: {tried:?}")),
        }
    }
}

/// Starts a server, echoes, and tells about it; then what the doctor says.
fn say_how_a_start_goes(config: Config) {
    match Server::new(config).listen("127.0.0.1:0", crate::common::echo).start() {
        Ok(running) => {
            let addr = crate::common::peer::tcp_addrs(&running)[0];
            let mut client = connect(addr);
            client.write_all(b"x").expect("send");
            client.read_exact(&mut [0]).expect("an answer");
            let cores = running.handle().stats().cores().len();
            running.handle().close();
            let report = running.join().expect("no core failed");
            assert!(report.is_balanced(), "{report}");
            println!("\nstart: served on {cores} cores");
        }
        Err(error) => println!("\nstart: {:?}: {error}", error.kind()),
    }
    let examination = slipring::doctor::examine();
    match examination.refusal() {
        None => println!("doctor: fit"),
        Some(refusal) => println!("doctor: {:?}: {refusal}", refusal.kind()),
    }
}

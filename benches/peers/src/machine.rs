//! What the programs need of the machine beyond `rig`: limits, memory, and ends.

use std::{fs, io};

/// This process is killed when the thread that started it ends.
pub fn end_with_parent() {
    // SAFETY: this option takes a signal number and no pointer.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// The CPU that the calling thread is on.
pub fn cpu() -> io::Result<usize> {
    // SAFETY: the call takes no argument.
    let cpu = unsafe { libc::sched_getcpu() };
    usize::try_from(cpu).map_err(|_| io::Error::last_os_error())
}

/// Lets this process have that many descriptors, beyond the hard limit if it is privileged.
///
/// # Errors
///
/// The hard limit is below it, and the process may not raise that.
pub fn raise_nofile(wanted: u64) -> io::Result<()> {
    match most_nofile(wanted)? {
        least if least >= wanted => Ok(()),
        least => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("RLIMIT_NOFILE is {least} and cannot become {wanted}"),
        )),
    }
}

/// Lets this process have that many descriptors, or as many as it may; how many it has now.
pub fn most_nofile(wanted: u64) -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one limit, which lives on this stack.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let before = limit;
    limit.rlim_cur = limit.rlim_cur.max(wanted);
    limit.rlim_max = limit.rlim_max.max(wanted);
    // SAFETY: the kernel reads one limit.
    if check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).is_ok() {
        return Ok(limit.rlim_cur);
    }
    limit = libc::rlimit { rlim_cur: before.rlim_max, ..before };
    // SAFETY: as above.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

/// Resident memory of a process.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// What it allocated: pages of no file.
    pub anonymous_bytes: u64,
    /// Code and mapped rings too.
    pub resident_bytes: u64,
}

/// Reads `/proc/PID/smaps_rollup`, which is exact where `VmRSS` is only nearly so.
pub fn memory(pid: u32) -> io::Result<Memory> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let bytes = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.map(|kib| kib * 1024)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "smaps_rollup is different"))
    };
    Ok(Memory { anonymous_bytes: bytes("Anonymous:")?, resident_bytes: bytes("Rss:")? })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

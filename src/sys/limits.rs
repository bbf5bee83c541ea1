//! The process's limits: `getrlimit(2)` and `setrlimit(2)`. `u64::MAX` means unlimited.

use std::fs;
use std::io;

/// How many file descriptors the process may have: the soft and the hard limit.
///
/// # Errors
///
/// Whatever `getrlimit(2)` fails with.
pub(crate) fn nofile() -> io::Result<(u64, u64)> {
    get(libc::RLIMIT_NOFILE).map(pair)
}

/// Sets the soft limit on file descriptors and leaves the hard one as it is.
///
/// # Errors
///
/// `EINVAL` when `soft` is above the hard limit.
pub(crate) fn set_nofile_soft(soft: u64) -> io::Result<()> {
    let mut limit = get(libc::RLIMIT_NOFILE)?;
    limit.rlim_cur = soft as libc::rlim_t;
    set(libc::RLIMIT_NOFILE, &limit)
}

/// How many bytes the user may lock in memory: the soft and the hard limit.
///
/// # Errors
///
/// Whatever `getrlimit(2)` fails with.
pub(crate) fn memlock() -> io::Result<(u64, u64)> {
    get(libc::RLIMIT_MEMLOCK).map(pair)
}

/// How many file descriptors the process has open; `None` without `/proc`.
pub(crate) fn open_fds() -> Option<usize> {
    // The listing holds a descriptor of its own while it is read, and lists it.
    fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1))
}

/// The C libraries disagree on the type of a resource's number.
#[cfg(target_env = "gnu")]
type Resource = libc::__rlimit_resource_t;
#[cfg(not(target_env = "gnu"))]
type Resource = libc::c_int;

fn get(resource: Resource) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live local, which is written before the call returns.
    let result = unsafe { libc::getrlimit(resource, &raw mut limit) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(limit) }
}

fn set(resource: Resource, limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: the pointer is to a live limit, which is only read, before the call returns.
    let result = unsafe { libc::setrlimit(resource, limit) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn pair(limit: libc::rlimit) -> (u64, u64) {
    (widen(limit.rlim_cur), widen(limit.rlim_max))
}

#[allow(clippy::unnecessary_cast, reason = "rlim_t has 32 bits on some 32-bit targets")]
fn widen(limit: libc::rlim_t) -> u64 {
    if limit == libc::RLIM_INFINITY { u64::MAX } else { limit as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_limits_are_not_above_the_hard_ones() {
        for (soft, hard) in [nofile().unwrap(), memlock().unwrap()] {
            assert!(soft <= hard, "{soft} {hard}");
        }
    }

    #[test]
    fn a_soft_limit_above_the_hard_one_is_refused() {
        let (_, hard) = nofile().unwrap();
        if hard < u64::MAX {
            let error = set_nofile_soft(hard + 1).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn open_descriptors_are_counted() {
        // Other tests open and close theirs meanwhile, hence a lower bound only.
        let held: Vec<_> = (0..32).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        assert!(open_fds().unwrap() >= held.len());
    }
}

//! The two clocks of the hot path, read without a system call (vdso(7)) and without the checks of
//! [`std::time::Instant`], which cost more than the reading.

use std::time::Duration;

/// Milliseconds since a moment that all threads share; never 0.
///
/// It is `CLOCK_MONOTONIC_COARSE` (clock_gettime(2)), which the kernel sets at each of its ticks: a
/// tick late at most, which is 1 to 10 ms.
pub(crate) fn coarse_ms() -> u64 {
    let now = read(libc::CLOCK_MONOTONIC_COARSE);
    (now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000).max(1)
}

/// A moment from which on all cores of a server count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Epoch {
    monotonic_ns: u64,
}

impl Epoch {
    pub(crate) fn now() -> Epoch {
        Epoch { monotonic_ns: monotonic_ns() }
    }

    #[inline]
    pub(crate) fn elapsed_ns(self) -> u64 {
        monotonic_ns() - self.monotonic_ns
    }

    pub(crate) fn elapsed(self) -> Duration {
        Duration::from_nanos(self.elapsed_ns())
    }
}

fn monotonic_ns() -> u64 {
    let now = read(libc::CLOCK_MONOTONIC);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn read(clock: libc::clockid_t) -> libc::timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one writable timespec; both clocks are there on every Linux.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn it_goes_as_fast_as_any_other_clock() {
        let (since, coarse) = (Instant::now(), coarse_ms());
        while since.elapsed() < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        let (passed_ms, exact_ms) = (coarse_ms() - coarse, since.elapsed().as_millis() as u64);
        assert!(passed_ms + 20 >= 50 && passed_ms <= exact_ms + 20, "{passed_ms} of {exact_ms}");
    }
}

//! A clock that costs next to nothing: `CLOCK_MONOTONIC_COARSE` (clock_gettime(2)), which the
//! kernel sets at each of its ticks. It is a tick late at most: 1 to 10 ms.

/// Milliseconds since an epoch that all threads share; never 0.
pub(crate) fn coarse_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: one writable timespec. Without a system call: vdso(7).
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &raw mut now) };
    (now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

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

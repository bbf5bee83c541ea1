//! Joining a thread for a limited time, which std can't.

use std::os::unix::thread::JoinHandleExt;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Joins a thread, its destructors included, unless `give_up` says so first; then it is detached.
pub(crate) fn join_until(thread: JoinHandle<()>, give_up: impl Fn() -> bool) {
    let id = thread.into_pthread_t();
    loop {
        // SAFETY: the id is of a thread that is neither joined nor detached, as the handle was
        // ours; a null pointer means that the thread's value is not wanted.
        if unsafe { libc::pthread_tryjoin_np(id, std::ptr::null_mut()) } == 0 {
            return;
        }
        if give_up() {
            // SAFETY: as above; it was not joined.
            unsafe { libc::pthread_detach(id) };
            return;
        }
        thread::sleep(STEP);
    }
}

const STEP: Duration = Duration::from_micros(100);

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_thread_that_goes_on_is_waited_for_no_longer_than_told() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let since = Instant::now();
        join_until(thread::spawn(|| ()), || false);
        let busy = thread::spawn(move || assert!(ended.recv().is_err()));
        join_until(busy, || since.elapsed() > Duration::from_millis(20));
        assert!(since.elapsed() < Duration::from_secs(5));
        drop(end);
    }
}

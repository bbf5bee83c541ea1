//! What std can't do with threads: join one for a limited time, and ask how one fares.

use std::fs;
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

/// How long the calling thread was ready to run and others had its CPU, in nanoseconds since it
/// began (proc(5)); `None` where the kernel does not say.
pub(crate) fn waited_ns() -> Option<u64> {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

const STEP: Duration = Duration::from_micros(100);

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no scheduler to ask")]
    fn a_thread_that_shares_its_cpu_has_waited_for_it() {
        let spin = || {
            let allowed = crate::sys::affinity::allowed().unwrap();
            crate::sys::affinity::pin(allowed[0]).unwrap();
            let (since, before_ns) = (Instant::now(), waited_ns()?);
            while since.elapsed() < Duration::from_millis(100) {
                std::hint::spin_loop();
            }
            Some(waited_ns()? - before_ns)
        };
        let threads = [thread::spawn(spin), thread::spawn(spin)];
        let waited = threads.map(|thread| thread.join().unwrap());
        // A kernel without CONFIG_SCHED_INFO does not say.
        if let [Some(a), Some(b)] = waited {
            assert!(a + b > 20_000_000, "{waited:?}");
        }
    }

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

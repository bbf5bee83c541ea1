//! Blocking work off the core, on the threads of the `blocking` crate's pool. To its caller it is a
//! call like one of another core.

use std::cell::Cell;

use crate::cores::{Call, Whom};
use crate::sys::affinity;

/// Runs a closure that blocks, such as a file's or a library's that knows no futures, on a thread
/// of a pool, and gives its answer back. The core goes on meanwhile, and its answer wakes it at
/// once.
///
/// It is on its way when this returns. Each core may have 256 of them under way; further ones wait
/// for their turn. The pool is the process's, that of the crate `blocking`: it starts threads as
/// they are needed, 500 at most unless `BLOCKING_MAX_THREADS` says otherwise, and ends those that
/// have nothing to do. They may run on the CPUs of the process's main thread, not only on that of
/// the core which has started them.
///
/// A drain waits for the task that awaits this as for any other. At its deadline the task is
/// dropped; nothing can stop the closure, which runs to its end, and its result is dropped then.
///
/// # Errors
/// The future's: [`ErrorKind::Misuse`](crate::ErrorKind::Misuse) outside of a core,
/// [`ErrorKind::Panicked`](crate::ErrorKind::Panicked) when the closure panics,
/// [`ErrorKind::Resource`](crate::ErrorKind::Resource) while 65 536 calls of this core are
/// unanswered.
///
/// # Cancel safety
/// Dropping the future gives up the answer. The closure runs all the same, unless it was still
/// waiting for its turn.
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// let read = slipring::task::blocking(|| std::fs::read_to_string("/etc/hostname"));
/// let name = read.await?;
/// # Ok(())
/// # }
/// ```
pub fn blocking<F, R>(run: F) -> Call<R>
where
    F: FnOnce() -> R + Send + 'static,
    R: Send + 'static,
{
    Call::begin(Whom::Pool, true, move |_, reply| {
        let work = move || {
            leave_the_cores_cpu();
            let answer = Box::new(run());
            reply.send(Ok(answer));
        };
        blocking::unblock(work).detach();
    })
}

/// A thread of the pool has inherited the CPU of the core that has started it.
pub(crate) fn leave_the_cores_cpu() {
    thread_local! {
        static LEFT: Cell<bool> = const { Cell::new(false) };
    }
    if !LEFT.replace(true) {
        // One that may not leave is slower, and works all the same.
        let _ = affinity::as_main_thread();
    }
}

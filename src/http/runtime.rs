//! What hyper takes from a runtime beside I/O: tasks and time.

use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::conn::Link;
use crate::core::CoreRef;
use crate::executor::Scope;
use crate::table::Id;
use crate::task::spawn_task;
use crate::time::{Sleep, sleep};

/// Runs hyper's tasks on the core of a connection, next to its handler; they end with it at the
/// latest. Futures need not be `Send`.
///
/// A future that finds no room (`SLIPRING_TASKS_MAX`) is dropped, which resets its stream, and is
/// counted in `tasks_refused`.
#[derive(Clone)]
pub struct Executor {
    core: CoreRef,
    id: Id,
}

impl Executor {
    /// Runs tasks next to a connection's handler.
    #[must_use]
    pub fn new(conn: &crate::Connection) -> Executor {
        Executor::of(conn.link())
    }

    pub(super) fn of(link: &Link) -> Executor {
        Executor { core: Rc::clone(&link.core), id: link.id }
    }
}

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + 'static,
    F::Output: 'static,
{
    #[track_caller]
    fn execute(&self, future: F) {
        let future = Box::pin(async move {
            future.await;
        });
        if spawn_task(&self.core, Scope::Child(self.id), Location::caller(), future).is_err() {
            self.core.borrow_mut().counters.tasks_refused.add(1);
        }
    }
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor").finish_non_exhaustive()
    }
}

/// hyper's timers on the core's timer wheel: to the millisecond, and without a system call.
///
/// Its sleeps are numbers, so they may be sent and dropped anywhere; they are polled on a core.
///
/// # Examples
///
/// ```
/// let mut http2 = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
/// http2.timer(slipring::http::Timer);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Timer;

impl hyper::rt::Timer for Timer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(sleep(duration))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(until(deadline))
    }

    fn reset(&self, timer: &mut Pin<Box<dyn hyper::rt::Sleep>>, deadline: Instant) {
        match timer.as_mut().downcast_mut_pin::<Sleep>() {
            Some(timer) => *timer.get_mut() = until(deadline),
            None => *timer = self.sleep_until(deadline),
        }
    }
}

fn until(deadline: Instant) -> Sleep {
    sleep(deadline.saturating_duration_since(Instant::now()))
}

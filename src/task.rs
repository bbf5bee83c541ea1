//! Tasks: futures that run on a core, beside the connections' handlers.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::closing::{Closing, until_closing};
use crate::core::CoreRef;
use crate::drain::Phase;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{LocalFuture, Scope, drop_guarded};
use crate::local;
use crate::sys::place::Place;
use crate::table::Id;

#[cfg(feature = "blocking")]
pub use crate::offload::blocking;

/// Runs a future on the core of the calling task, next to it.
///
/// The task is counted, and it ends at the latest when the drain's deadline comes. A drain waits
/// for it until then; [`draining`] tells it that one has begun. Dropping the handle detaches the
/// task from its caller, not from its core.
///
/// # Errors
/// [`ErrorKind::Misuse`] outside of a core; [`ErrorKind::Resource`] when the core has
/// `SLIPRING_TASKS_MAX` tasks already; [`ErrorKind::Closed`] when the core is already past its
/// drain's deadline.
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// let answer = slipring::task::spawn(async { 6 * 7 })?;
/// assert_eq!(answer.await?, 42);
/// # Ok(())
/// # }
/// ```
#[track_caller]
pub fn spawn<F>(future: F) -> Result<JoinHandle<F::Output>>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let core = local::current("task::spawn")?;
    spawn_in(&core, Scope::Core, std::panic::Location::caller(), future)
}

/// Lets every other ready task run before it goes on.
///
/// # Cancel safety
/// Dropping it changes nothing.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs a future on the core of the calling task as [`spawn`] does, but no drain waits for it: it
/// is dropped when everything else has ended, and the report has its name. For what goes on as
/// long as the core does, such as a collector of metrics.
///
/// # Errors
/// As [`spawn`].
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// use std::time::Duration;
///
/// slipring::task::detach("metrics", async {
///     loop {
///         slipring::time::sleep(Duration::from_secs(10)).await;
///     }
/// })?;
/// # Ok(())
/// # }
/// ```
#[track_caller]
pub fn detach<F>(name: &'static str, future: F) -> Result<()>
where
    F: Future<Output = ()> + 'static,
{
    let core = local::current("task::detach")?;
    let place = std::panic::Location::caller();
    let id = spawn_task(&core, Scope::Core, place, Box::pin(future))?;
    core.borrow_mut().tasks.detach(id, name);
    Ok(())
}

/// Waits until the core begins to drain, and says whether the whole server does. Advisory: finish
/// up; what is not finished at the drain's deadline is dropped.
///
/// # Errors
/// [`ErrorKind::Misuse`] outside of a core.
///
/// # Cancel safety
/// Dropping it changes nothing.
pub async fn draining() -> Result<Closing> {
    let core = local::current("task::draining")?;
    Ok(until_closing(core, None).await)
}

/// Waits for a task's result; see [`spawn`].
///
/// # Cancel safety
/// Dropping it detaches the task, which goes on.
pub struct JoinHandle<T> {
    join: Rc<RefCell<Join<T>>>,
    core: CoreRef,
    id: Id,
}

enum Join<T> {
    Running(Option<Waker>),
    Done(T),
    /// It panicked, was aborted, was dropped at the drain's deadline, or the result was taken.
    Gone,
}

impl<T> JoinHandle<T> {
    /// Drops the task's future, now or as soon as it returns from the poll that it is in. Waiting
    /// for the handle then gives an error of kind [`ErrorKind::Closed`].
    pub fn abort(&self) {
        // The place of one that has ended may be another's.
        if !self.is_finished() {
            abort_task(&self.core, self.id);
        }
    }

    /// Whether the task has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        !matches!(*self.join.borrow(), Join::Running(_))
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut join = self.join.borrow_mut();
        if let Join::Running(waiter) = &mut *join {
            *waiter = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(match std::mem::replace(&mut *join, Join::Gone) {
            Join::Done(value) => Ok(value),
            _ => Err(Error::new(ErrorKind::Closed, "wait for a task")
                .because("it panicked, was aborted or was dropped at the drain's deadline")),
        })
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle").field("finished", &self.is_finished()).finish()
    }
}

/// Sets the result to `Gone` and wakes the waiter when the future is dropped unfinished.
struct JoinGuard<T>(Rc<RefCell<Join<T>>>);

impl<T> JoinGuard<T> {
    fn settle(&self, outcome: Join<T>) {
        let before = std::mem::replace(&mut *self.0.borrow_mut(), outcome);
        if let Join::Running(Some(waiter)) = before {
            waiter.wake();
        }
    }
}

impl<T> Drop for JoinGuard<T> {
    fn drop(&mut self) {
        if matches!(*self.0.borrow(), Join::Running(_)) {
            self.settle(Join::Gone);
        }
    }
}

pub(crate) fn spawn_in<F>(
    core: &CoreRef,
    scope: Scope,
    place: Place,
    future: F,
) -> Result<JoinHandle<F::Output>>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let join = Rc::new(RefCell::new(Join::Running(None)));
    let guard = JoinGuard(Rc::clone(&join));
    let wrapped = Box::pin(async move {
        let output = future.await;
        guard.settle(Join::Done(output));
    });
    let id = spawn_task(core, scope, place, wrapped)?;
    Ok(JoinHandle { join, core: CoreRef::clone(core), id })
}

pub(crate) fn spawn_task(
    core: &CoreRef,
    scope: Scope,
    place: Place,
    future: LocalFuture,
) -> Result<Id> {
    let mut core = core.borrow_mut();
    if core.drain.phase() >= Phase::Force {
        let error = Error::new(ErrorKind::Closed, "spawn a task");
        return Err(error.because("the drain's deadline has come"));
    }
    if core.tasks.len() >= core.settings.tasks_max && scope != Scope::Hook {
        let error = Error::new(ErrorKind::Resource, "spawn a task");
        return Err(error.because(format!(
            "the core has {} tasks, which is SLIPRING_TASKS_MAX",
            core.settings.tasks_max
        )));
    }
    let core = &mut *core;
    match scope {
        Scope::Core | Scope::Hook => Ok(core.tasks.insert(scope, place, future)),
        Scope::Handler(connection) | Scope::Child(connection) => {
            let Some(entry) = core.table.get_mut(connection) else {
                let error = Error::new(ErrorKind::Closed, "spawn a task");
                return Err(error.because("its connection has ended"));
            };
            let id = core.tasks.insert(scope, place, future);
            entry.company().children.push(id);
            Ok(id)
        }
    }
}

pub(crate) fn abort_task(core: &CoreRef, id: Id) {
    let body = {
        let core = &mut *core.borrow_mut();
        if let Some(entry) = core.tasks.parent(id).and_then(|parent| core.table.get_mut(parent)) {
            entry.forget_child(id);
        }
        core.tasks.abort(id)
    };
    drop_guarded(body);
}

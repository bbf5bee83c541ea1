//! The local executor: which tasks a core has and which are to be polled.
//!
//! A task is woken in one of three ways. A completion that the task waits for marks it ready
//! directly, by its id: no waker, no atomic ([`Wake::Task`]). A [`Waker`] used on the core's own
//! thread puts the id on a thread-local list. A waker used on any other thread posts the id to
//! the core's mailbox, once until the core has seen it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, RawWakerVTable, Waker};

use crate::core::{self, CoreRef, Message, Post};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::place::Place;
use crate::table::{Id, Table};

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

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
/// # async fn handler(mut conn: slipring::Connection) -> slipring::Result<()> {
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
    let core = core::current("task::spawn")?;
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

/// Waits until the core begins to drain. Advisory: finish up; what is not finished at the drain's
/// deadline is dropped.
///
/// # Errors
/// [`ErrorKind::Misuse`] outside of a core.
///
/// # Cancel safety
/// Dropping it changes nothing.
pub async fn draining() -> Result<()> {
    let core = core::current("task::draining")?;
    core::drain_begins(core).await;
    Ok(())
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
        core::abort_task(&self.core, self.id);
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
    let id = core::spawn_task(core, scope, place, wrapped)?;
    Ok(JoinHandle { join, core: CoreRef::clone(core), id })
}

/// With what a task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// With its core.
    Core,
    /// With the connection; this is its handler.
    Handler(Id),
    /// With the connection.
    Child(Id),
}

/// Somebody who waits for something of this core.
#[derive(Debug, Default)]
pub(crate) enum Wake {
    #[default]
    Nobody,
    /// A task of this core, to be marked ready.
    Task(Id),
    /// A waker that is not a task's own, such as that of a combinator.
    Foreign(Waker),
}

/// The tasks of one core.
#[derive(Debug)]
pub(crate) struct Tasks {
    table: Table<Task>,
    ready: VecDeque<Id>,
    /// The task that is being polled, and what its waker looks like.
    running: Option<(Id, WakerIdentity)>,
    post: Post,
    /// Wakers to be used when nobody has the core borrowed: they may run anyone's code.
    foreign: Vec<Waker>,
}

#[derive(Debug)]
struct Task {
    /// Out while the task is polled.
    body: Option<Body>,
    queued: bool,
    aborted: bool,
    scope: Scope,
    place: Place,
}

/// What polling a task takes.
pub(crate) struct Body {
    pub(crate) future: LocalFuture,
    pub(crate) waker: Waker,
    remote: Arc<Remote>,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").finish_non_exhaustive()
    }
}

type WakerIdentity = (*const (), *const RawWakerVTable);

fn identity(waker: &Waker) -> WakerIdentity {
    (waker.data(), ptr::from_ref(waker.vtable()))
}

impl Tasks {
    pub(crate) fn new(post: Post) -> Tasks {
        Tasks {
            table: Table::new(),
            ready: VecDeque::new(),
            running: None,
            post,
            foreign: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn insert(&mut self, scope: Scope, place: Place, future: LocalFuture) -> Id {
        let task = Task { body: None, queued: false, aborted: false, scope, place };
        let id = self.table.insert(task);
        let remote =
            Arc::new(Remote { id, posted: AtomicBool::new(false), post: Arc::clone(&self.post) });
        let waker = Waker::from(Arc::clone(&remote));
        let task = self.table.get_mut(id).expect("invariant: inserted above");
        task.body = Some(Body { future, waker, remote });
        self.make_ready(id);
        id
    }

    /// Queues a task for a poll, once.
    pub(crate) fn make_ready(&mut self, id: Id) {
        if let Some(task) = self.table.get_mut(id)
            && !task.queued
        {
            task.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Uses up what waits, leaving nobody.
    pub(crate) fn wake(&mut self, wake: &mut Wake) {
        match std::mem::take(wake) {
            Wake::Nobody => {}
            Wake::Task(id) => self.make_ready(id),
            Wake::Foreign(waker) => self.foreign.push(waker),
        }
    }

    /// Remembers who polls: the running task by its id if the waker is its own.
    pub(crate) fn register(&mut self, wake: &mut Wake, waker: &Waker) {
        let new = match (self.running, &*wake) {
            (Some((id, own)), _) if own == identity(waker) => Wake::Task(id),
            (_, Wake::Foreign(old)) if old.will_wake(waker) => return,
            _ => Wake::Foreign(waker.clone()),
        };
        if let Wake::Foreign(old) = std::mem::replace(wake, new) {
            // Dropping a waker may run anyone's code, so not here; waking it too does no harm.
            self.foreign.push(old);
        }
    }

    pub(crate) fn take_foreign(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.foreign)
    }

    /// Takes in what wakers of this thread have left since.
    pub(crate) fn collect_local_wakes(&mut self) {
        LOCAL.with(|local| {
            if local.core.get() == Some(self.post.serial()) {
                let mut woken = local.woken.borrow_mut();
                for id in woken.drain(..) {
                    self.make_ready(id);
                }
            }
        });
    }

    pub(crate) fn has_foreign(&self) -> bool {
        !self.foreign.is_empty()
    }

    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty() || !self.foreign.is_empty()
    }

    /// Takes the next ready task out to be polled.
    pub(crate) fn start_next(&mut self) -> Option<(Id, Scope, Place, Body)> {
        loop {
            let id = self.ready.pop_front()?;
            let Some(task) = self.table.get_mut(id) else { continue };
            task.queued = false;
            // A task that is being polled further up the stack is not polled again.
            let Some(body) = task.body.take() else { continue };
            // From here on a wake-up of another thread is news again.
            body.remote.posted.swap(false, Ordering::AcqRel);
            self.running = Some((id, identity(&body.waker)));
            return Some((id, task.scope, task.place, body));
        }
    }

    /// Puts a task back that is not finished. Gives it back if it was aborted meanwhile.
    pub(crate) fn park(&mut self, id: Id, body: Body) -> Option<Body> {
        self.running = None;
        match self.table.get_mut(id) {
            Some(task) if !task.aborted => {
                task.body = Some(body);
                None
            }
            _ => {
                self.table.remove(id);
                Some(body)
            }
        }
    }

    pub(crate) fn finish(&mut self, id: Id) {
        self.running = None;
        self.table.remove(id);
    }

    /// Removes a task; its future is to be dropped by the caller, outside of any borrow. One that
    /// is being polled is removed when that poll returns.
    pub(crate) fn abort(&mut self, id: Id) -> Option<Body> {
        let task = self.table.get_mut(id)?;
        match task.body.take() {
            Some(body) => {
                self.table.remove(id);
                Some(body)
            }
            None => {
                task.aborted = true;
                None
            }
        }
    }

    pub(crate) fn ids(&self) -> Vec<Id> {
        self.table.ids().collect()
    }
}

/// The part of a task that other threads may hold: it outlives the task, and knows only its id.
struct Remote {
    id: Id,
    /// Whether a wake-up is on its way to the core already.
    posted: AtomicBool,
    post: Post,
}

impl std::task::Wake for Remote {
    fn wake(self: Arc<Remote>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Remote>) {
        let here = LOCAL.with(|local| {
            let here = local.core.get() == Some(self.post.serial());
            if here {
                let mut woken = local.woken.borrow_mut();
                if woken.last() != Some(&self.id) {
                    woken.push(self.id);
                }
            }
            here
        });
        if !here && !self.posted.swap(true, Ordering::AcqRel) {
            // A core that is gone has no tasks to wake.
            let _ = self.post.post(Message::Wake(self.id));
        }
    }
}

thread_local! {
    static LOCAL: Local = const { Local { core: Cell::new(None), woken: RefCell::new(Vec::new()) } };
}

/// What wakers find when they are used on a core's own thread.
struct Local {
    core: Cell<Option<u64>>,
    woken: RefCell<Vec<Id>>,
}

/// Says which core this thread is, for as long as wakers may be used here.
pub(crate) fn set_local_core(serial: Option<u64>) {
    LOCAL.with(|local| local.core.set(serial));
}

/// The text of a panic, as far as it has one.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panicked with something that is not text".to_owned())
}

//! The local executor: which tasks a core has, which are to be polled, and polling them.
//!
//! A task is woken in one of three ways. A completion that the task waits for marks it ready
//! directly, by its id: no waker, no atomic ([`Wake::Task`]). A [`Waker`] used on the core's own
//! thread puts the id on a thread-local list. A waker used on any other thread posts the id to
//! the core's mailbox, once until the core has seen it.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::ptr;
use std::rc::Rc;
use std::task::{Context, Poll, RawWakerVTable, Waker};

use crate::core::{Core, CoreCell};
use crate::post::Post;
use crate::ready::Ready;
use crate::report::CloseReason;
use crate::sys::clock::coarse_ms;
use crate::sys::place::Place;
use crate::table::{Id, Table};
use crate::waker::{Lent, Remote, take_local_wakes};

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

/// With what a task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// With its core.
    Core,
    /// With its core; the program has asked for it at the beginning of a drain.
    Hook,
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
    Foreign(Box<Waker>),
}

/// The tasks of one core.
#[derive(Debug)]
pub(crate) struct Tasks {
    table: Table<Task>,
    /// Those of them that no drain waits for, and what they are called.
    detached: Vec<(Id, &'static str)>,
    ready: Ready,
    /// The task that is being polled, and what its waker looks like.
    running: Option<(Id, WakerIdentity)>,
    /// In use while tasks are polled.
    lent: Option<Lent>,
    post: Post,
    /// Wakers to be used when nobody has the core borrowed: they may run anyone's code.
    foreign: Vec<Waker>,
    /// Wakers to be dropped then.
    displaced: Vec<Waker>,
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

// Each connection has one.
const _: () = assert!(size_of::<Task>() <= 56);

/// What polling a task takes.
pub(crate) struct Body {
    pub(crate) future: LocalFuture,
    /// Its own waker, if it has kept one.
    waker: Option<Waker>,
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
            detached: Vec::new(),
            ready: Ready::default(),
            running: None,
            lent: None,
            post,
            foreign: Vec::new(),
            displaced: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn insert(&mut self, scope: Scope, place: Place, future: LocalFuture) -> Id {
        let body = Some(Body { future, waker: None });
        let id = self.table.insert(Task { body, queued: true, aborted: false, scope, place });
        self.ready.push(id);
        id
    }

    /// Queues a task for a poll, once.
    #[inline]
    pub(crate) fn make_ready(&mut self, id: Id) {
        if let Some(task) = self.table.get_mut(id)
            && !task.queued
        {
            task.queued = true;
            self.ready.push(id);
        }
    }

    /// Another thread has woken a task.
    pub(crate) fn hear_wake(&mut self, remote: &Remote) {
        self.make_ready(remote.hear());
    }

    /// Uses up what waits, leaving nobody.
    #[inline(always)]
    pub(crate) fn wake(&mut self, wake: &mut Wake) {
        match *wake {
            Wake::Nobody => {}
            Wake::Task(id) => {
                *wake = Wake::Nobody;
                self.make_ready(id);
            }
            Wake::Foreign(_) => self.wake_foreign(wake),
        }
    }

    #[cold]
    fn wake_foreign(&mut self, wake: &mut Wake) {
        if let Wake::Foreign(waker) = std::mem::take(wake) {
            self.foreign.push(*waker);
        }
    }

    /// Remembers who polls: the running task by its id if the waker is its own.
    #[inline]
    pub(crate) fn register(&mut self, wake: &mut Wake, waker: &Waker) {
        match self.running {
            Some((id, own)) if own == identity(waker) && !matches!(wake, Wake::Foreign(_)) => {
                *wake = Wake::Task(id);
            }
            _ => self.register_other(wake, waker),
        }
    }

    #[cold]
    fn register_other(&mut self, wake: &mut Wake, waker: &Waker) {
        let new = match (self.running, &*wake) {
            (Some((id, own)), _) if own == identity(waker) => Wake::Task(id),
            (_, Wake::Foreign(old)) if old.will_wake(waker) => return,
            _ => Wake::Foreign(Box::new(waker.clone())),
        };
        if let Wake::Foreign(old) = std::mem::replace(wake, new) {
            // Dropping a waker may run anyone's code, so not here.
            self.displaced.push(*old);
        }
    }

    /// Drops who waits, when nobody has the core borrowed.
    pub(crate) fn discard(&mut self, wake: Option<Wake>) {
        if let Some(Wake::Foreign(waker)) = wake {
            self.displaced.push(*waker);
        }
    }

    /// The wakers to be used, and those to be dropped.
    pub(crate) fn take_wakers(&mut self) -> (Vec<Waker>, Vec<Waker>) {
        (std::mem::take(&mut self.foreign), std::mem::take(&mut self.displaced))
    }

    /// Takes in what wakers of this thread have left since.
    pub(crate) fn collect_local_wakes(&mut self) {
        take_local_wakes(self.post.serial(), |id| self.make_ready(id));
    }

    pub(crate) fn has_wakers(&self) -> bool {
        !self.foreign.is_empty() || !self.displaced.is_empty()
    }

    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty() || !self.foreign.is_empty()
    }

    /// Takes the next ready task out to be polled, with its own waker or the one that is lent.
    #[inline]
    fn start_next(&mut self, lent: &Lent) -> Option<(Id, Place, Body)> {
        loop {
            let id = self.ready.pop().or_else(|| {
                self.collect_local_wakes();
                self.ready.pop()
            })?;
            let Some(task) = self.table.get_mut(id) else { continue };
            task.queued = false;
            // A task that is being polled further up the stack is not polled again.
            let Some(body) = task.body.take() else { continue };
            let waker = body.waker.as_ref().unwrap_or_else(|| lent.lend(id));
            self.running = Some((id, identity(waker)));
            return Some((id, task.place, body));
        }
    }

    /// Puts a task back that is not finished. Gives it back if it was aborted meanwhile.
    #[inline]
    pub(crate) fn park(&mut self, id: Id, body: Body) -> Option<Body> {
        self.running = None;
        match self.table.get_mut(id) {
            Some(task) if !task.aborted => {
                task.body = Some(body);
                None
            }
            _ => {
                self.remove(id);
                Some(body)
            }
        }
    }

    /// Removes a task that has finished, and says with what it would have ended.
    pub(crate) fn finish(&mut self, id: Id) -> Option<Scope> {
        self.running = None;
        self.remove(id).map(|task| task.scope)
    }

    /// Removes a task; its future is to be dropped by the caller, outside of any borrow. One that
    /// is being polled is removed when that poll returns.
    pub(crate) fn abort(&mut self, id: Id) -> Option<Body> {
        let task = self.table.get_mut(id)?;
        match task.body.take() {
            Some(body) => {
                self.remove(id);
                Some(body)
            }
            None => {
                task.aborted = true;
                None
            }
        }
    }

    /// The connection whose handler is being polled.
    pub(crate) fn running_handler(&self) -> Option<Id> {
        match self.table.get(self.running?.0)?.scope {
            Scope::Handler(connection) => Some(connection),
            _ => None,
        }
    }

    /// The connection that a task was spawned to end with.
    pub(crate) fn parent(&self, id: Id) -> Option<Id> {
        match self.table.get(id)?.scope {
            Scope::Child(connection) => Some(connection),
            _ => None,
        }
    }

    /// Where a task that is alive was spawned.
    pub(crate) fn place(&self, id: Id) -> Option<Place> {
        self.table.get(id).map(|task| task.place)
    }

    /// Those that a drain waits for.
    pub(crate) fn waited_for(&self) -> usize {
        self.table.len() - self.detached.len()
    }

    /// No drain is to wait for this one any more.
    pub(crate) fn detach(&mut self, id: Id, name: &'static str) {
        self.detached.push((id, name));
    }

    fn remove(&mut self, id: Id) -> Option<Task> {
        if !self.detached.is_empty() {
            self.detached.retain(|(detached, _)| *detached != id);
        }
        self.table.remove(id)
    }

    pub(crate) fn ids(&self) -> Vec<Id> {
        self.table.ids().collect()
    }
}

/// The text of a panic, as far as it has one.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panicked with something that is not text".to_owned())
}

impl CoreCell {
    pub(crate) fn run_tasks(self: &Rc<CoreCell>) {
        let mut now_ms = coarse_ms();
        let mut core = self.borrow_mut();
        let mut lent = core.tasks.lent.take().unwrap_or_else(|| Lent::new(&core.tasks.post));
        for _ in 0..core.settings.task_budget {
            if core.has_unburied() {
                drop(core);
                self.bury();
                now_ms = coarse_ms();
                core = self.borrow_mut();
            }
            let Some((id, place, mut body)) = core.tasks.start_next(&lent) else { break };
            core.counters.running.set(place);
            core.counters.watch.poll_begins(now_ms);
            drop(core);
            let mut cx = Context::from_waker(body.waker.as_ref().unwrap_or(lent.waker()));
            let polled = catch_unwind(AssertUnwindSafe(|| body.future.as_mut().poll(&mut cx)));
            let polled = polled.map_err(discard_panic);
            core = self.borrow_mut();
            if let Some(kept) = lent.leave_if_kept() {
                body.waker = Some(kept);
            }
            core.counters.polls.add(1);
            now_ms = coarse_ms();
            if core.counters.watch.poll_ends(place, now_ms) {
                core.counters.stalls.add(1);
            }
            core.counters.running.clear();
            match polled {
                Ok(Poll::Pending) => {
                    if let Some(aborted) = core.tasks.park(id, body) {
                        core.graveyard.push(aborted);
                    }
                }
                Ok(Poll::Ready(())) => {
                    core.finish_task(id, body);
                }
                Err(()) => {
                    core.count_panic(place);
                    if let Some(Scope::Handler(connection)) = core.finish_task(id, body) {
                        core.fail(connection, CloseReason::HandlerPanic);
                    }
                }
            }
        }
        core.tasks.lent = Some(lent);
        drop(core);
        self.bury();
        self.borrow_mut().tasks.collect_local_wakes();
    }

    /// Drops the futures and wakes the wakers that wait for the core to be free.
    pub(crate) fn bury(self: &Rc<CoreCell>) {
        let mut dead = Vec::new();
        loop {
            let (wakers, displaced) = {
                let mut core = self.borrow_mut();
                if !core.has_unburied() {
                    core.keep_graveyard(dead);
                    return;
                }
                std::mem::swap(&mut core.graveyard, &mut dead);
                core.tasks.take_wakers()
            };
            drop_guarded(dead.drain(..));
            for waker in displaced {
                guarded(move || drop(waker));
            }
            for waker in wakers {
                guarded(move || waker.wake());
            }
        }
    }
}

impl Core {
    fn has_unburied(&self) -> bool {
        !self.graveyard.is_empty() || self.tasks.has_wakers()
    }

    /// Keeps the room of an emptied graveyard for the next task that ends.
    fn keep_graveyard(&mut self, emptied: Vec<Body>) {
        if self.graveyard.capacity() == 0 && emptied.capacity() <= GRAVES_KEPT {
            self.graveyard = emptied;
        }
    }

    /// Code that was spawned there, or given to the server there, has panicked.
    pub(crate) fn count_panic(&mut self, _place: Place) {
        self.counters.panics.add(1);
        traced!(self.events.get_mut().panicked = Some(_place));
    }

    fn finish_task(&mut self, id: Id, body: Body) -> Option<Scope> {
        let scope = self.tasks.finish(id);
        if let Some(Scope::Handler(connection) | Scope::Child(connection)) = scope
            && let Some(entry) = self.table.get_mut(connection)
        {
            entry.forget_child(id);
            entry.handler.take_if(|handler| *handler == id);
        }
        self.graveyard.push(body);
        scope
    }

    /// Takes every task out; called when the deadline has come.
    pub(crate) fn take_all_tasks(&mut self) -> Vec<Body> {
        let ids = self.tasks.ids();
        self.counters.tasks_forced.add(self.tasks.waited_for() as u64);
        for id in &ids {
            if let Some(task) = self.tasks.table.get(*id) {
                let name = self.tasks.detached.iter().find(|(detached, _)| detached == id);
                self.leftover.note(task.scope, task.place, name.map(|(_, name)| *name));
            }
        }
        let mut bodies = std::mem::take(&mut self.graveyard);
        bodies.extend(ids.into_iter().filter_map(|id| self.tasks.abort(id)));
        bodies
    }
}

/// Dropping a future is running anyone's code, and may panic.
pub(crate) fn drop_guarded(bodies: impl IntoIterator<Item = Body>) {
    for body in bodies {
        guarded(move || drop(body));
    }
}

/// Runs anyone's code, whose panic is its own. False when it did.
pub(crate) fn guarded(run: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(()) => true,
        Err(panic) => {
            discard_panic(panic);
            false
        }
    }
}

/// Drops what a panic has carried, which may panic as well; then that is leaked.
pub(crate) fn discard_panic(panic: Box<dyn Any + Send>) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(move || drop(panic))) {
        std::mem::forget(again);
    }
}

/// A graveyard with room for more than so many tasks is freed when it is empty.
const GRAVES_KEPT: usize = 64;

//! What the cores of a server have to do with one another: state that each has of its own, and
//! calls from one to another.
//!
//! Cores share nothing, so what one of them owns needs no lock: [`Server::state`] gives each its
//! own, and [`state`] finds it. What belongs to another core is reached by a message: [`call`] runs
//! a closure there and brings back what it returns, [`spawn`] does the same with a future.
//!
//! Messages leave at the end of the caller's turn, all that go to the same core together, so that
//! it is woken once at most; answers come back the same way. A call therefore waits for the ends of
//! two turns, the caller's and the other core's: it pays to send few calls with much to do.
//!
//! ```no_run
//! use std::cell::RefCell;
//! use std::collections::HashMap;
//! use slipring::{Config, Connection, Server, cores};
//!
//! /// The part of the users that a core has.
//! type Users = RefCell<HashMap<u64, String>>;
//!
//! async fn name_of(user: u64) -> slipring::Result<Option<String>> {
//!     let owner = user as usize % cores::current()?.cores;
//!     cores::call(owner, move || {
//!         let users = cores::state::<Users>()?;
//!         let name = users.borrow().get(&user).cloned();
//!         Ok(name)
//!     })
//!     .await?
//! }
//!
//! # async fn greet(conn: Connection) -> slipring::Result<()> { Ok(()) }
//! fn main() -> slipring::Result<()> {
//!     let server = Server::new(Config::default()).state(|_core| Users::default());
//!     server.listen("127.0.0.1:7000", greet).run().map(drop)
//! }
//! ```

use std::any::{Any, TypeId, type_name};
use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::calls::{Loss, Reply, Stage};
use crate::core::{Core, CoreRef};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Scope;
use crate::local;
use crate::post::{Message, Post};
use crate::server::{CoreInfo, Server};
use crate::sys::place::Place;
use crate::table::Id;
use crate::task::spawn_task;

/// Which core of its server the calling thread is.
///
/// # Errors
/// [`ErrorKind::Misuse`] outside of a core.
pub fn current() -> Result<CoreInfo> {
    Ok(local::current("cores::current")?.borrow_mut().info)
}

/// What [`Server::state`] has made for the core of the calling thread; for handlers, tasks and
/// calls.
///
/// A handler asks once and keeps it: each call looks it up.
///
/// # Errors
/// [`ErrorKind::Misuse`] outside of a core, and where the server has no state of this type.
pub fn state<T: 'static>() -> Result<Rc<T>> {
    let core = local::current("cores::state")?;
    let state = core.borrow_mut().states.get(TypeId::of::<T>());
    state.and_then(|state| state.downcast::<T>().ok()).ok_or_else(|| {
        Error::new(ErrorKind::Misuse, "cores::state").because(format!(
            "the server has no state of type {}; make it with Server::state",
            type_name::<T>()
        ))
    })
}

/// Runs a closure on another core of the server, which is counted from 0, and gives its answer
/// back. The own core is a core like any other.
///
/// The call is on its way when this returns, so that several can be sent before the first is
/// awaited; those that one core sends to another run in that order. The closure runs between that
/// core's tasks and holds them up, so it should be short; [`spawn`] is for what takes longer. While
/// 256 calls to that core are unanswered, further ones wait for their turn.
///
/// In a drain of the server, a core that has state or has run a call before goes on answering until
/// no core has a task or a connection left, or until its time is up. One that is retired alone
/// does not wait for the others, and their calls fail once it has ended.
///
/// # Errors
/// The future's: [`ErrorKind::Misuse`] outside of a core and for a core that the server does not
/// have, [`ErrorKind::Closed`] for one that has ended or ends before it has run the closure,
/// [`ErrorKind::Panicked`] when the closure panics, [`ErrorKind::Resource`] while 65 536 calls of
/// this core are unanswered. A core that is stuck does not answer: where that must not hold up the
/// caller, it uses [`time::timeout`](crate::time::timeout).
///
/// # Cancel safety
/// Dropping the future gives up the answer. The closure runs all the same, unless the call was
/// still waiting for its turn.
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// use slipring::cores;
///
/// let calls: Vec<_> = (0..cores::current()?.cores)
///     .map(|core| cores::call(core, || std::thread::current().name().map(str::to_owned)))
///     .collect();
/// for call in calls {
///     println!("{:?}", call.await?);
/// }
/// # Ok(())
/// # }
/// ```
#[track_caller]
pub fn call<F, R>(core: usize, run: F) -> Call<R>
where
    F: FnOnce() -> R + Send + 'static,
    R: Send + 'static,
{
    Call::to_core(core, Location::caller(), true, move |reply| {
        Box::new(move |target: &CoreRef| {
            let answer = Box::new(run());
            reply.send_from(&mut target.borrow_mut(), Ok(answer));
        })
    })
}

/// Runs a future on another core of the server as a task of that core, and gives its answer back.
/// `make` runs there, so that the future need not be `Send`.
///
/// Like one of [`task::spawn`](crate::task::spawn), that core's drain waits for the task, and drops
/// it at its deadline.
///
/// # Errors
/// As those of [`call`], and [`ErrorKind::Resource`] when that core has `SLIPRING_TASKS_MAX` tasks
/// or has still to hear of 65 536 that this core has spawned there.
///
/// # Cancel safety
/// Dropping the future gives up the answer; the task goes on.
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// use std::time::Duration;
///
/// let slept = slipring::cores::spawn(0, || async {
///     slipring::time::sleep(Duration::from_millis(5)).await;
///     "well"
/// });
/// assert_eq!(slept.await?, "well");
/// # Ok(())
/// # }
/// ```
#[track_caller]
pub fn spawn<M, F>(core: usize, make: M) -> Call<F::Output>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future + 'static,
    F::Output: Send + 'static,
{
    let place = Location::caller();
    // Without a lane: tasks may wait for calls of their own, and one that waits for room which
    // tasks keep that wait for it would wait for good.
    Call::to_core(core, place, false, move |mut reply| {
        Box::new(move |target: &CoreRef| {
            reply.is_heard();
            let future = make();
            // The task's, but for one that is refused.
            let reply = Rc::new(Cell::new(Some(reply)));
            let (cell, its_reply) = (Rc::clone(target), Rc::clone(&reply));
            let task = async move {
                let answer = Box::new(future.await);
                if let Some(reply) = its_reply.take() {
                    reply.send_from(&mut cell.borrow_mut(), Ok(answer));
                }
            };
            if let Err(error) = spawn_task(target, Scope::Core, place, Box::pin(task))
                && let Some(reply) = reply.take()
            {
                reply.send_from(&mut target.borrow_mut(), Err(Loss::Refused(error)));
            }
        })
    })
}

/// The answer of a call, to be awaited; see [`call`], [`spawn`] and, with the feature `blocking`,
/// `task::blocking`.
#[must_use = "without being awaited its answer and its failure are lost"]
pub struct Call<R> {
    state: CallState,
    /// What the call is, for errors.
    whom: Whom,
    answer: PhantomData<fn() -> R>,
}

enum CallState {
    Sent(CoreRef, Id),
    Failed(Option<Error>),
}

/// Who is to answer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Whom {
    Core(usize),
    #[cfg(feature = "blocking")]
    Pool,
}

impl Whom {
    pub(crate) fn operation(self) -> String {
        match self {
            Whom::Core(core) => format!("call core {core}"),
            #[cfg(feature = "blocking")]
            Whom::Pool => "task::blocking".to_owned(),
        }
    }
}

/// What a core runs for another one.
pub(crate) type Errand = Box<dyn FnOnce(&CoreRef) + Send>;

impl<R: Send + 'static> Call<R> {
    fn to_core<E>(target: usize, place: Place, in_lane: bool, errand: E) -> Call<R>
    where
        E: FnOnce(Reply) -> Errand + 'static,
    {
        Call::begin(Whom::Core(target), in_lane, move |core, reply| {
            let to = Post::clone(&core.control.seats()[target].post);
            core.outbox.push(&to, Message::Run(place, errand(reply)));
        })
    }

    /// A launch that is refused is dropped when nobody has the core borrowed: what it has captured
    /// is anyone's.
    pub(crate) fn begin<L>(whom: Whom, in_lane: bool, launch: L) -> Call<R>
    where
        L: FnOnce(&mut Core, Reply) + 'static,
    {
        let begun = local::current("call a core").and_then(|core| {
            let lane = core.borrow_mut().admit_call(whom)?;
            let id = core.borrow_mut().begin_call(lane, in_lane, launch);
            Ok(CallState::Sent(CoreRef::clone(&core), id))
        });
        let state = begun.unwrap_or_else(|error| CallState::Failed(Some(error)));
        Call { state, whom, answer: PhantomData }
    }
}

impl<R: Send + 'static> Future for Call<R> {
    type Output = Result<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<R>> {
        let again = || Error::new(ErrorKind::Misuse, "poll a call that has been answered");
        let (cell, id) = match &mut self.state {
            CallState::Sent(cell, id) => (CoreRef::clone(cell), *id),
            CallState::Failed(error) => {
                return Poll::Ready(Err(error.take().unwrap_or_else(again)));
            }
        };
        let stage = {
            let core = &mut *cell.borrow_mut();
            match core.calls.slots.get_mut(id) {
                Some(slot) if !matches!(slot.stage, Stage::Answered(_)) => {
                    core.tasks.register(&mut slot.wake, cx.waker());
                    return Poll::Pending;
                }
                _ => core.forget_call(id),
            }
        };
        self.state = CallState::Failed(None);
        let outcome = match stage {
            Some(Stage::Answered(outcome)) => outcome,
            _ => Err(Loss::Gone),
        };
        Poll::Ready(match outcome {
            Ok(answer) => Ok(*answer.downcast().expect("invariant: an answer has its call's type")),
            Err(loss) => Err(loss.into_error(self.whom.operation())),
        })
    }
}

impl<R> Drop for Call<R> {
    fn drop(&mut self) {
        if let CallState::Sent(core, id) = &self.state {
            let stage = core.borrow_mut().forget_call(*id);
            drop(stage);
        }
    }
}

impl<R> fmt::Debug for Call<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_sent = matches!(self.state, CallState::Sent(..));
        f.debug_struct("Call").field("to", &self.whom).field("sent", &is_sent).finish()
    }
}

/// What a core has of its own for the program, by type.
#[derive(Default)]
pub(crate) struct States(Vec<(TypeId, Rc<dyn Any>)>);

impl States {
    pub(crate) fn make(makers: &[StateMaker], core: &CoreInfo) -> States {
        States(makers.iter().map(|maker| (maker.type_id, (maker.make)(core))).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, wanted: TypeId) -> Option<Rc<dyn Any>> {
        self.0.iter().find(|(id, _)| *id == wanted).map(|(_, state)| Rc::clone(state))
    }
}

impl fmt::Debug for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "States({})", self.0.len())
    }
}

/// What each core makes its state of a type with.
#[derive(Clone)]
pub(crate) struct StateMaker {
    type_id: TypeId,
    make: Arc<MakeState>,
}

type MakeState = dyn Fn(&CoreInfo) -> Rc<dyn Any> + Send + Sync;

impl Server {
    /// Gives each core state of its own, which handlers, tasks and calls of other cores find with
    /// [`cores::state`](state). It is made on the core, before the handlers of
    /// [`Server::listen_with`], and dropped there when the core's tasks have ended, and in a drain
    /// of the server also those of the other cores, which may still [`call`]. What is made for a
    /// type that there is already takes its place.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::cell::Cell;
    /// use slipring::{Config, Connection, Server, cores};
    ///
    /// async fn count(mut conn: Connection) -> slipring::Result<()> {
    ///     let served = cores::state::<Cell<u64>>()?;
    ///     served.set(served.get() + 1);
    ///     conn.send(format!("you are number {} here\n", served.get())).await
    /// }
    ///
    /// fn main() -> slipring::Result<()> {
    ///     let server = Server::new(Config::default()).state(|_core| Cell::new(0u64));
    ///     server.listen("127.0.0.1:7000", count).run().map(drop)
    /// }
    /// ```
    pub fn state<M, T>(mut self, make: M) -> Server
    where
        M: Fn(&CoreInfo) -> T + Send + Sync + 'static,
        T: 'static,
    {
        let type_id = TypeId::of::<T>();
        self.states.retain(|maker| maker.type_id != type_id);
        let make = Arc::new(move |core: &CoreInfo| -> Rc<dyn Any> { Rc::new(make(core)) });
        self.states.push(StateMaker { type_id, make });
        self
    }
}

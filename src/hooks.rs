//! Hooks: what a program has to do on each core when a drain begins.

use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;

use crate::core::CoreCell;
use crate::executor::{LocalFuture, Scope, guarded};
use crate::server::{CoreInfo, Server};
use crate::sys::place::Place;
use crate::task::spawn_task;

/// What is run, and where it was given to the server.
#[derive(Clone)]
pub(crate) struct Hook {
    run: Arc<dyn Fn(CoreInfo) -> LocalFuture + Send + Sync>,
    place: Place,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hook({})", self.place)
    }
}

impl Server {
    /// Runs a future on each core when that core's drain begins, such as to tell a registry that
    /// this server is leaving. The drain waits for it as it does for a task, and drops it at the
    /// deadline; the report says where one stands that was dropped.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use slipring::{Config, Connection, Server};
    ///
    /// # async fn echo(_conn: Connection) -> slipring::Result<()> { Ok(()) }
    /// # async fn leave_the_registry() {}
    /// # fn main() -> slipring::Result<()> {
    /// let server = Server::new(Config::default()).listen("127.0.0.1:7000", echo).on_drain(
    ///     |core| async move {
    ///         if core.index == 0 {
    ///             leave_the_registry().await;
    ///         }
    ///     },
    /// );
    /// # server.run().map(drop)
    /// # }
    /// ```
    #[track_caller]
    pub fn on_drain<H, F>(mut self, hook: H) -> Server
    where
        H: Fn(CoreInfo) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + 'static,
    {
        let run = Arc::new(move |core| -> LocalFuture { Box::pin(hook(core)) });
        self.hooks.push(Hook { run, place: Location::caller() });
        self
    }
}

impl CoreCell {
    /// Hears of a drain, starts the hooks when it has begun, and goes through its phases.
    pub(crate) fn advance_drain(self: &Rc<CoreCell>) {
        let (hooks, info) = {
            let mut core = self.borrow_mut();
            if !core.hear_of_drain() {
                return;
            }
            (std::mem::take(&mut core.hooks), core.info)
        };
        for Hook { run: hook, place } in hooks {
            // Hooks are anyone's code; a panic in one is its own.
            let run = || {
                if spawn_task(self, Scope::Hook, place, hook(info)).is_ok() {
                    self.borrow_mut().hooks_run += 1;
                }
            };
            if !guarded(run) {
                self.borrow_mut().count_panic(place);
            }
        }
        self.borrow_mut().advance_drain();
    }
}

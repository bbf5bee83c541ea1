//! The handle: what any thread can ask of a running server.

use std::future::Future;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::drain::Phase;
use crate::error::{Error, ErrorKind, Result};
use crate::local::is_core_thread;
use crate::post::Message;
use crate::report::{CoreReport, DrainReport};
use crate::stats::Stats;

/// Watches and ends a server from any thread. Each core's eventfd stays open for as long as one
/// is kept.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) control: Arc<Control>,
    drain_within: Duration,
}

impl Handle {
    pub(crate) fn new(control: Arc<Control>, drain_within: Duration) -> Handle {
        Handle { control, drain_within }
    }

    /// Drains the server within `deadline` and waits for it: stops accepting, serves or closes
    /// what is queued, lets connections finish, forces the rest, and returns the account at most
    /// 100 ms after the deadline, whatever any handler does.
    ///
    /// While a drain runs, another call can only shorten it.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] on a core of a server; use [`Handle::begin_drain`] there.
    pub fn drain(&self, deadline: Duration) -> Result<DrainReport> {
        self.wait_allowed("drain")?;
        self.begin_drain(deadline);
        Ok(self.control.wait())
    }

    /// As [`Handle::drain`], without waiting for it. Any thread may, a core too.
    pub fn begin_drain(&self, deadline: Duration) {
        self.control.begin_drain(deadline);
    }

    /// Forces the server to end now: a drain without time. Does not wait.
    pub fn close(&self) {
        self.control.begin_drain(Duration::ZERO);
    }

    /// The deadline that a drain gets from the configuration (`SLIPRING_DRAIN_MS`).
    #[must_use]
    pub fn drain_default(&self) -> Duration {
        self.drain_within
    }

    /// What the cores have counted so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.control.stats()
    }

    /// Runs a future on a core, which is counted from 0. `make` runs there, so that the future
    /// need not be `Send`.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] for a core that the server does not have, [`ErrorKind::Closed`] for
    /// one that has ended, [`ErrorKind::Resource`] while 65 536 messages wait for it. A future that
    /// the core then can't take, as it has `SLIPRING_TASKS_MAX` tasks or its drain's deadline has
    /// come, is dropped and counted in `tasks_refused`.
    #[track_caller]
    pub fn spawn_on<M, F>(&self, core: usize, make: M) -> Result<()>
    where
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = ()> + 'static,
    {
        let seats = self.control.seats();
        let Some(seat) = seats.get(core) else {
            return Err(Error::new(ErrorKind::Misuse, format!("spawn on core {core}"))
                .because(format!("the server has {} cores", seats.len())));
        };
        let message = Message::Spawn(Location::caller(), Box::new(|| Box::pin(make())));
        seat.post.mailbox.post_among(message, WAITING_MAX).map_err(|refused| {
            let operation = format!("spawn on core {core}");
            if refused.full {
                Error::new(ErrorKind::Resource, operation)
                    .because(format!("{WAITING_MAX} messages wait for the core already"))
            } else {
                Error::new(ErrorKind::Closed, operation).because("the core has ended")
            }
        })
    }

    /// Takes one core out of a server that goes on, and waits for it: the other cores get its new
    /// connections, and then it drains as [`Handle::drain`] does, without a lame duck's time. Its
    /// account is in the report of the drain that ends the server, too.
    ///
    /// The kernel is told to choose among the listeners that stay, for which no privilege is
    /// needed, so that nobody who connects meanwhile is refused or reset, unless other processes
    /// share the port: then the kernel's choice may miss. Cores are counted from 0; those that stay
    /// take over its share of `SLIPRING_CONNECTIONS_MAX`. It can't be undone.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] on a core of a server, for a core that the server does not have, and
    /// for the last one that has not left, or that accepts from a socket that was passed in:
    /// [`Handle::drain`] is the way to end a server.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(running: slipring::Running) -> slipring::Result<()> {
    /// let left = running.handle().retire(3, std::time::Duration::from_secs(10))?;
    /// assert!(left.is_balanced());
    /// # Ok(())
    /// # }
    /// ```
    pub fn retire(&self, core: usize, deadline: Duration) -> Result<CoreReport> {
        self.wait_allowed("retire a core")?;
        let refused = |why: String| {
            Err(Error::new(ErrorKind::Misuse, format!("retire core {core}")).because(why))
        };
        let cores = self.control().seats().len();
        if core >= cores {
            return refused(format!("the server has {cores} cores"));
        }
        match self.control().retire(core, deadline) {
            Ok(deadline_ns) => Ok(self.control().wait_for(core, deadline_ns)),
            Err(why) => refused(why),
        }
    }

    /// Whether a load balancer should send connections here: true from the start until the moment
    /// at which a drain is ordered, which is before it stops accepting.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.control().deadline_ns() == u64::MAX
    }

    /// Where the server stands: the phase of the core that has got least far. A core that
    /// leaves alone does not count.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.control().phase()
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    pub(crate) fn wait_allowed(&self, operation: &'static str) -> Result<()> {
        if is_core_thread() {
            return Err(Error::new(ErrorKind::Misuse, operation)
                .because("a core would wait for itself; use begin_drain here"));
        }
        Ok(())
    }
}

/// So many messages may wait for a core that does not hear them.
const WAITING_MAX: usize = 65_536;

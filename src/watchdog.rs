//! The thread that tells of stalls while they go on. Only a server with a hook for it has one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::control::{Control, Seat};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::guarded;
use crate::server::Server;
use crate::stalls::{PAST_MAX, Stall};

/// Who is told; see [`Server::on_stall`].
pub(crate) type StallHook = dyn Fn(&Stall) + Send + Sync;

impl Server {
    /// Calls `hook` once for each stall of a core, while it goes on, from a thread that only then
    /// exists. [`Handle::stalls`](crate::Handle::stalls) says what a stall is. On a server that was
    /// idle one may be noticed a second late. Whatever the hook does, it holds up no core.
    ///
    /// There is no such thread when `SLIPRING_STALL_MS` is 0.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(server: slipring::Server) {
    /// let server = server.on_stall(|stall| eprintln!("{stall}"));
    /// # }
    /// ```
    pub fn on_stall<F>(mut self, hook: F) -> Server
    where
        F: Fn(&Stall) + Send + Sync + 'static,
    {
        self.on_stall = Some(Arc::new(hook));
        self
    }
}

/// What the watchdog remembers of one core.
#[derive(Debug, Default)]
struct Told {
    /// When the stalls began that the hook knows, more than a core remembers.
    since_ms: VecDeque<u64>,
    polls: u64,
}

/// Starts to watch; the thread ends with the server.
pub(crate) fn start(
    control: &Arc<Control>,
    hook: Arc<StallHook>,
    stall_ms: u64,
) -> Result<JoinHandle<()>> {
    let control = Arc::clone(control);
    let thread = thread::Builder::new().name("slipring-watch".to_owned());
    let watch = move || watch(&control, &*hook, stall_ms);
    thread.spawn(watch).map_err(|error| {
        Error::os("start the watchdog's thread", error).with_kind(ErrorKind::Resource)
    })
}

fn watch(control: &Control, hook: &StallHook, stall_ms: u64) {
    let mut told: Vec<Told> = control.seats().iter().map(|_| Told::default()).collect();
    let shortest = Duration::from_millis((stall_ms / LOOKS).max(STEP_MS_MIN));
    let mut step = shortest;
    while !control.has_ended_within(step) {
        let mut busy = false;
        for (core, (seat, told)) in control.seats().iter().zip(&mut told).enumerate() {
            busy |= told.look(core, seat, hook);
        }
        // A core that sleeps can't stall before it wakes up.
        step = if busy { shortest } else { (step * 2).min(STEP_MAX.max(shortest)) };
    }
}

impl Told {
    /// Tells what is new. True when the core has run since the last look, or runs now.
    fn look(&mut self, core: usize, seat: &Seat, hook: &StallHook) -> bool {
        for (since_ms, stall) in seat.watched(core) {
            if self.since_ms.contains(&since_ms) {
                continue;
            }
            if self.since_ms.len() > 2 * PAST_MAX {
                self.since_ms.pop_front();
            }
            self.since_ms.push_back(since_ms);
            // It is anyone's code; what it throws is its own.
            guarded(|| hook(&stall));
        }
        let polls = seat.counters.polls.get();
        let ran = std::mem::replace(&mut self.polls, polls) != polls;
        ran || seat.counters.watch.is_in_turn()
    }
}

/// In how many steps a stall's time is looked at while cores are busy.
const LOOKS: u64 = 4;
const STEP_MS_MIN: u64 = 5;
/// How long it sleeps while all cores do.
const STEP_MAX: Duration = Duration::from_secs(1);

//! Time on a core: sleeping, time limits, intervals. All of it rests on the core's timer wheel;
//! nothing here costs a system call.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::core::{Core, NS_PER_MS, Timer};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Wake;
use crate::local;
use crate::table::Id;
use crate::wheel::{Precision, TimerKey};

/// Waits for `duration`: never less, and at most a millisecond and the core's current turn more.
///
/// # Cancel safety
/// Dropping it changes nothing.
///
/// # Panics
/// When polled outside of a core.
///
/// # Examples
///
/// ```
/// # async fn handler(conn: slipring::Connection) -> slipring::Result<()> {
/// slipring::time::sleep(std::time::Duration::from_millis(20)).await;
/// # Ok(())
/// # }
/// ```
pub fn sleep(duration: Duration) -> Sleep {
    let duration_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let deadline = match local::current("sleep") {
        Ok(core) => Due::At(core.borrow_mut().driver.now_ns().saturating_add(duration_ns)),
        Err(_) => Due::After(duration_ns),
    };
    Sleep { deadline, sleeper: None }
}

/// Runs a future for at most `duration`.
///
/// # Errors
/// [`ErrorKind::TimedOut`] when the time has passed first; the future is dropped.
///
/// # Cancel safety
/// That of the future.
///
/// # Examples
///
/// ```
/// # use std::time::Duration;
/// # async fn handler(mut conn: slipring::Connection) -> slipring::Result<()> {
/// let chunk = slipring::time::timeout(Duration::from_secs(1), conn.recv()).await??;
/// # Ok(())
/// # }
/// ```
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output> {
    let mut sleep = sleep(duration);
    let mut future = pin!(future);
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut sleep)
            .poll(cx)
            .map(|()| Err(Error::new(ErrorKind::TimedOut, format!("timeout of {duration:?}"))))
    })
    .await
}

/// Ticks every `period`, the first time after one period. A tick that was missed is not made up
/// for: the next one comes at the next multiple of the period.
///
/// # Panics
/// When `period` is zero.
///
/// # Examples
///
/// ```
/// # async fn task() {
/// let mut every_second = slipring::time::interval(std::time::Duration::from_secs(1));
/// loop {
///     every_second.tick().await;
/// }
/// # }
/// ```
pub fn interval(period: Duration) -> Interval {
    assert!(!period.is_zero(), "an interval's period must not be zero");
    Interval { period, next: sleep(period) }
}

/// The future of [`sleep`]. It holds nothing but numbers.
pub struct Sleep {
    deadline: Due,
    /// The core that has the timer, and the timer's place there.
    sleeper: Option<(u64, Id)>,
}

#[derive(Clone, Copy)]
enum Due {
    /// In the cores' nanoseconds.
    At(u64),
    /// Counted from the first poll, as it was made outside of a core.
    After(u64),
}

/// A sleeper of a core, until its timer fires.
#[derive(Debug)]
pub(crate) struct Sleeper {
    pub(crate) wake: Wake,
    timer: TimerKey,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let cell = local::current("poll a sleep").unwrap_or_else(|error| panic!("{error}"));
        let core = &mut *cell.borrow_mut();
        let deadline_ns = match self.deadline {
            Due::At(ns) => ns,
            Due::After(ns) => core.driver.now_ns().saturating_add(ns),
        };
        self.deadline = Due::At(deadline_ns);
        if core.now_ns >= deadline_ns {
            if let Some((_, id)) = self.sleeper.take_if(|(serial, _)| *serial == cell.serial()) {
                core.remove_sleeper(id);
            }
            return Poll::Ready(());
        }
        let known = self
            .sleeper
            .filter(|(serial, id)| *serial == cell.serial() && core.sleepers.contains(*id));
        let (_, id) = known.unwrap_or_else(|| (cell.serial(), core.add_sleeper(deadline_ns)));
        self.sleeper = Some((cell.serial(), id));
        let Core { sleepers, tasks, .. } = core;
        if let Some(sleeper) = sleepers.get_mut(id) {
            tasks.register(&mut sleeper.wake, cx.waker());
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        // On another thread than its core's, the timer fires for nobody, which does no harm.
        if let Some((serial, id)) = self.sleeper
            && let Ok(cell) = local::current("drop a sleep")
            && cell.serial() == serial
        {
            cell.borrow_mut().remove_sleeper(id);
        }
    }
}

impl fmt::Debug for Sleep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sleep").field("armed", &self.sleeper.is_some()).finish()
    }
}

/// A periodic timer; see [`interval`].
#[derive(Debug)]
pub struct Interval {
    period: Duration,
    next: Sleep,
}

impl Interval {
    /// Waits for the next tick.
    ///
    /// # Cancel safety
    /// Safe: the tick is still to come.
    pub async fn tick(&mut self) {
        (&mut self.next).await;
        let period_ns = u64::try_from(self.period.as_nanos()).unwrap_or(u64::MAX);
        let now_ns = local::current("tick").map(|core| core.borrow_mut().now_ns);
        if let (Due::At(last_ns), Ok(now_ns)) = (self.next.deadline, now_ns) {
            let missed = now_ns.saturating_sub(last_ns) / period_ns;
            let next_ns = last_ns.saturating_add(period_ns.saturating_mul(missed + 1));
            self.next = Sleep { deadline: Due::At(next_ns), sleeper: None };
        }
    }
}

impl Core {
    fn add_sleeper(&mut self, deadline_ns: u64) -> Id {
        let deadline_ms = deadline_ns.div_ceil(NS_PER_MS);
        // The timer names its sleeper, so the sleeper's place is taken first.
        let id = self.sleepers.next_id();
        let timer = self.wheel.insert(deadline_ms, Precision::Exact, Timer::Sleeper(id.index));
        self.sleepers.insert(Sleeper { wake: Wake::Nobody, timer });
        id
    }

    /// A sleeper's time has come.
    pub(crate) fn wake_sleeper(&mut self, slot: u32, timer: TimerKey) {
        let id = self.sleepers.id_if(slot, |sleeper| sleeper.timer == timer);
        if let Some(mut sleeper) = id.and_then(|id| self.sleepers.remove(id)) {
            self.tasks.wake(&mut sleeper.wake);
        }
    }

    fn remove_sleeper(&mut self, id: Id) {
        if let Some(Sleeper { wake, timer }) = self.sleepers.remove(id) {
            self.wheel.cancel(timer);
            self.tasks.discard(Some(wake));
        }
    }
}

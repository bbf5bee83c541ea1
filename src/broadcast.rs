//! Broadcast: values that every receiver on every core gets, in one order for all that are on the
//! same core.
//!
//! Each core that has receivers keeps the last values of a channel in a queue of its own, from
//! which its receivers read. Whoever sends puts a copy into each of these queues and leaves one
//! message for the core, however many values follow before the core has heard it. Nobody who sends
//! ever waits: when a queue is full its oldest value goes, and a receiver that had not read it is
//! told how many it has missed. The words are those of tokio's channel of the same name.
//!
//! ```no_run
//! use std::sync::Arc;
//! use slipring::{Config, Connection, Server, broadcast};
//!
//! type News = broadcast::Sender<Arc<str>>;
//!
//! async fn tell(mut conn: Connection, news: News) -> slipring::Result<()> {
//!     let mut receiver = news.subscribe()?;
//!     loop {
//!         match receiver.recv().await {
//!             Ok(line) => conn.write(line.as_bytes()).await?,
//!             Err(broadcast::RecvError::Lagged(missed)) => {
//!                 conn.write(format!("you missed {missed}\n").as_bytes()).await?;
//!             }
//!             Err(broadcast::RecvError::Closed) => return Ok(()),
//!         }
//!     }
//! }
//!
//! fn main() -> slipring::Result<()> {
//!     let news = News::new(1024);
//!     let tell = move |conn| tell(conn, news.clone());
//!     Server::new(Config::default()).listen("127.0.0.1:7000", tell).run().map(drop)
//! }
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::task::{Context, Poll};

use crate::audience::{Audience, Notice};
use crate::core::CoreRef;
use crate::error::Result;
use crate::executor::Wake;
use crate::local;
use crate::table::Id;

/// The sending side of a channel. Clones send to the same receivers, from any thread.
pub struct Sender<T> {
    channel: Arc<Channel<T>>,
}

struct Channel<T> {
    /// Tells it apart from all others of the process.
    number: u64,
    capacity: usize,
    senders: AtomicUsize,
    /// One for each core that has receivers.
    desks: RwLock<Vec<Arc<Desk<T>>>>,
}

/// Where a channel reaches one core.
struct Desk<T> {
    queue: Mutex<Queue<T>>,
    notice: Arc<Notice>,
}

/// The last values, for the receivers of one core.
struct Queue<T> {
    values: VecDeque<Value<T>>,
    /// The number of the first one.
    first: u64,
    capacity: usize,
    receivers: usize,
    closed: bool,
}

struct Value<T> {
    value: T,
    /// Receivers that have still to read it.
    unread: usize,
}

impl<T: Clone + Send + 'static> Sender<T> {
    /// A channel without receivers, of which each core keeps the last `capacity` values at most.
    ///
    /// Values are cloned under the channel's locks, so that `T::clone` should be cheap, as that of
    /// an [`Arc`] is, and must not use the channel, which would wait for itself for good.
    ///
    /// # Panics
    /// When `capacity` is zero.
    #[must_use]
    pub fn new(capacity: usize) -> Sender<T> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        assert!(capacity > 0, "a broadcast's capacity must not be zero");
        let channel = Channel {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            capacity,
            senders: AtomicUsize::new(1),
            desks: RwLock::new(Vec::new()),
        };
        Sender { channel: Arc::new(channel) }
    }

    /// Sends a value to everyone who has subscribed, on all cores, and does not wait. Without
    /// receivers it is dropped.
    ///
    /// Other cores hear of it at once. What one sender sends arrives in that order everywhere.
    pub fn send(&self, value: T) {
        let desks = self.channel.desks.read().unwrap_or_else(PoisonError::into_inner);
        let mut displaced = Vec::new();
        if let Some((last, others)) = desks.split_last() {
            for desk in others {
                displaced.extend(desk.push(value.clone()));
            }
            displaced.extend(last.push(value));
        }
        drop(desks);
        // Dropping a value is running anyone's code, so not under a lock.
        drop(displaced);
    }

    /// A receiver for what is sent from now on, on the core of the calling task.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`](crate::ErrorKind::Misuse) outside of a core.
    pub fn subscribe(&self) -> Result<Receiver<T>> {
        let cell = local::current("broadcast::Sender::subscribe")?;
        let core = &mut *cell.borrow_mut();
        let number = self.channel.number;
        let audience = match core.audiences.find(number) {
            Some(audience) => audience,
            None => {
                let notice = core.audiences.next_notice(&core.post);
                let desk = Arc::new(Desk::new(self.channel.capacity, Arc::clone(&notice)));
                self.channel.lock_desks().push(Arc::clone(&desk));
                core.audiences.insert(Audience::new(number, desk))
            }
        };
        let seats = core.audiences.get_mut(audience);
        let seats = seats.expect("invariant: found or inserted above");
        let desk = Arc::clone(&seats.desk).downcast::<Desk<T>>();
        let desk = desk.unwrap_or_else(|_| unreachable!("invariant: a channel has one type"));
        let seat = seats.wakes.insert(Wake::Nobody);
        let next = desk.lock().join();
        Ok(Receiver {
            channel: Arc::clone(&self.channel),
            desk,
            core: CoreRef::clone(&cell),
            audience,
            seat,
            next,
        })
    }

    /// How many receivers there are, on all cores.
    #[must_use]
    pub fn receiver_count(&self) -> usize {
        let desks = self.channel.desks.read().unwrap_or_else(PoisonError::into_inner);
        desks.iter().map(|desk| desk.lock().receivers).sum()
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.channel.senders.fetch_add(1, Ordering::Relaxed);
        Sender { channel: Arc::clone(&self.channel) }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.channel.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            let desks = self.channel.desks.read().unwrap_or_else(PoisonError::into_inner);
            for desk in desks.iter() {
                desk.lock().closed = true;
                desk.notice.post();
            }
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("capacity", &self.channel.capacity).finish_non_exhaustive()
    }
}

impl<T> Channel<T> {
    fn lock_desks(&self) -> std::sync::RwLockWriteGuard<'_, Vec<Arc<Desk<T>>>> {
        self.desks.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A receiver of a channel; it stays on the core that has subscribed.
pub struct Receiver<T> {
    channel: Arc<Channel<T>>,
    desk: Arc<Desk<T>>,
    core: CoreRef,
    audience: Id,
    seat: Id,
    /// The number of the value that it reads next.
    next: u64,
}

/// Why a receiver has got no value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvError {
    /// It was too slow: so many values have been dropped that it had not read. The next call goes
    /// on with the oldest that is left.
    Lagged(u64),
    /// Every sender is gone, and everything has been read.
    Closed,
}

impl fmt::Display for RecvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecvError::Lagged(missed) => write!(f, "the receiver was too slow for {missed} values"),
            RecvError::Closed => f.write_str("every sender is gone"),
        }
    }
}

impl std::error::Error for RecvError {}

impl<T: Clone> Receiver<T> {
    /// Waits for the next value.
    ///
    /// # Errors
    /// * [`RecvError::Lagged`]: values were dropped before it had read them, and are counted in
    ///   [`CoreStats::broadcast_missed`](crate::CoreStats::broadcast_missed).
    /// * [`RecvError::Closed`]: there will be no more.
    ///
    /// # Cancel safety
    /// Safe: no value is lost.
    pub fn recv(&mut self) -> impl Future<Output = std::result::Result<T, RecvError>> {
        poll_fn(|cx| self.poll_recv(cx))
    }

    /// As [`Receiver::recv`], for futures made by hand.
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<std::result::Result<T, RecvError>> {
        let read = self.desk.lock().read(&mut self.next);
        if let Some(read) = read {
            if let Err(RecvError::Lagged(missed)) = read {
                self.core.borrow_mut().counters.broadcast_missed.add(missed);
            }
            return Poll::Ready(read);
        }
        // What is put into the queue after that look is announced by a message, which this very
        // thread has still to hear.
        let core = &mut *self.core.borrow_mut();
        let audience = core.audiences.get_mut(self.audience);
        if let Some(wake) = audience.and_then(|audience| audience.wakes.get_mut(self.seat)) {
            core.tasks.register(wake, cx.waker());
        }
        Poll::Pending
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let (unread, is_last) = {
            let mut queue = self.desk.lock();
            (queue.leave(self.next), queue.receivers == 0)
        };
        {
            let core = &mut *self.core.borrow_mut();
            let wake = core.audiences.leave(self.audience, self.seat, is_last);
            core.tasks.discard(wake);
        }
        if is_last {
            self.channel.lock_desks().retain(|desk| !Arc::ptr_eq(desk, &self.desk));
        }
        drop(unread);
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("next", &self.next).finish_non_exhaustive()
    }
}

impl<T> Desk<T> {
    fn new(capacity: usize, notice: Arc<Notice>) -> Desk<T> {
        let queue =
            Queue { values: VecDeque::new(), first: 0, capacity, receivers: 0, closed: false };
        Desk { queue: Mutex::new(queue), notice }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a value in, and tells the core. Returns what had to go, to be dropped by the caller.
    fn push(&self, value: T) -> Option<T> {
        let displaced = self.lock().push(value);
        self.notice.post();
        displaced
    }
}

impl<T> Queue<T> {
    fn end(&self) -> u64 {
        self.first + self.values.len() as u64
    }

    /// One more receiver; returns the number of the value that it reads first.
    fn join(&mut self) -> u64 {
        self.receivers += 1;
        self.end()
    }

    /// A receiver is gone that would have read that number next. Returns what nobody reads then.
    fn leave(&mut self, next: u64) -> Vec<T> {
        self.receivers -= 1;
        let read = next.saturating_sub(self.first) as usize;
        for value in self.values.iter_mut().skip(read) {
            value.unread -= 1;
        }
        let mut unread = Vec::new();
        while self.values.front().is_some_and(|value| value.unread == 0) {
            self.first += 1;
            unread.extend(self.values.pop_front().map(|value| value.value));
        }
        unread
    }

    fn push(&mut self, value: T) -> Option<T> {
        if self.receivers == 0 {
            return Some(value);
        }
        self.values.push_back(Value { value, unread: self.receivers });
        if self.values.len() <= self.capacity {
            return None;
        }
        self.first += 1;
        self.values.pop_front().map(|value| value.value)
    }
}

impl<T: Clone> Queue<T> {
    /// What a receiver reads next; `None` when it has read all.
    fn read(&mut self, next: &mut u64) -> Option<std::result::Result<T, RecvError>> {
        if *next < self.first {
            let missed = self.first - std::mem::replace(next, self.first);
            return Some(Err(RecvError::Lagged(missed)));
        }
        let Some(value) = self.values.get_mut((*next - self.first) as usize) else {
            return self.closed.then_some(Err(RecvError::Closed));
        };
        *next += 1;
        value.unread -= 1;
        if value.unread > 0 {
            return Some(Ok(value.value.clone()));
        }
        // Whoever has read this one has read those before it.
        self.first += 1;
        self.values.pop_front().map(|value| Ok(value.value))
    }
}

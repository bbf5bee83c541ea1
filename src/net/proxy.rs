//! Passing everything on between two connections, both ways, until both are done.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::buf::SendBuf;
use crate::conn::{Connection, Link};
use crate::core::{Core, CoreRef, NS_PER_MS};
use crate::deadline::DeadlineKind;
use crate::drain::Phase;
use crate::error::{Error, Result};
use crate::report::CloseReason;
use crate::split::ReadHalf;
use crate::table::Id;
use crate::time::{Sleep, sleep};

/// How many bytes [`proxy()`] has passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transferred {
    /// From the first connection to the second.
    pub a_to_b: u64,
    /// From the second connection to the first.
    pub b_to_a: u64,
}

/// Passes everything that comes on one connection on to the other, both ways, until both have
/// ended their sides. Nothing is copied: what was received is sent from the same memory.
///
/// # How it ends
/// The end of one side is passed on as a FIN behind what came before it, and the other direction
/// goes on to its own end. A reset, a deadline or any other error of one connection ends the other
/// with a reset, so that its peer does not take what it has got for the whole; so does dropping
/// the future. The error says on which of the two it was. Only a drain's deadline ends both with a
/// FIN.
///
/// # Memory
/// Each direction holds at most what one connection may have queued for sending
/// (`SLIPRING_SEND_QUEUE_BYTES`) and the other received (`SLIPRING_RECEIVE_QUEUE_BYTES`); when a
/// peer does not take more, nothing more is received for it.
///
/// # Deadlines
/// Those of both connections hold. While one has to wait for the other to take output, it is that
/// one's write stall and least rate that count, and no deadline of the one that waits.
///
/// # In a drain
/// What is in flight is finished. Bytes do not tell where a request ends, so this goes by who has
/// spoken last: when an accepted connection is told that the server drains and that it is idle, no
/// more is taken from it, while what was passed on from it is answered; once the answer has paused
/// for `SLIPRING_NEW_GRACE_MS`, both are done, and end with a FIN when they are dropped. The same
/// holds at the end of a connection's lifetime.
///
/// # Errors
/// As [`Connection::recv`] and [`Connection::send`] of either. Both connections are over then.
///
/// # Cancel safety
/// Not safe: what was received and not queued for sending yet is lost with the future, so that
/// dropping it resets both connections.
///
/// # Examples
///
/// ```
/// use slipring::{Connection, net};
///
/// async fn pass_on(mut client: Connection) -> slipring::Result<()> {
///     let mut upstream = net::connect("127.0.0.1:7000").await?;
///     let passed_on = net::proxy(&mut client, &mut upstream).await?;
///     println!("{} bytes there, {} back", passed_on.a_to_b, passed_on.b_to_a);
///     Ok(())
/// }
/// ```
pub async fn proxy(a: &mut Connection, b: &mut Connection) -> Result<Transferred> {
    let (to_a, to_b) = (a.link().clone(), b.link().clone());
    let traffic = Traffic::default();
    let there = pump(a.read_half(), &to_b, Way::There, &traffic);
    let back = pump(b.read_half(), &to_a, Way::Back, &traffic);
    let both = Both {
        there: pin!(there),
        back: pin!(back),
        ends: [None; 2],
        traffic: &traffic,
        links: [&to_a, &to_b],
        pause: None,
    };
    let mut bond = Bond::tie([&to_a, &to_b]);
    both.run().await?;
    bond.untie();
    Ok(traffic.moved())
}

/// What ties two connections to one another: neither ends well while the other does not.
struct Bond<'a> {
    links: [&'a Link; 2],
    tied: bool,
}

impl<'a> Bond<'a> {
    fn tie(links: [&'a Link; 2]) -> Bond<'a> {
        let mut bond = Bond { links, tied: true };
        bond.set(true);
        bond
    }

    /// Both have come to their end.
    fn untie(&mut self) {
        self.set(false);
    }

    fn set(&mut self, tied: bool) {
        self.tied = tied;
        for Link { core, id } in self.links {
            if let Some(entry) = core.borrow_mut().table.get_mut(*id) {
                entry.tied = tied;
            }
        }
    }
}

impl Drop for Bond<'_> {
    /// What is on its way is lost, so that no end may look like that of a whole. A drain's deadline
    /// says by itself what it does to connections.
    fn drop(&mut self) {
        for Link { core, id } in self.links.into_iter().filter(|_| self.tied) {
            let core = &mut *core.borrow_mut();
            if core.drain.phase() < Phase::Force {
                core.end(*id, CloseReason::Aborted);
            }
        }
    }
}

/// A direction of a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

/// How a direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Its source has ended its side, and that was passed on.
    Finished,
    /// Its source is to leave, and no more is taken from it.
    Dismissed,
}

/// What has gone each way.
#[derive(Debug, Default)]
struct Traffic {
    bytes: [Cell<u64>; 2],
    /// Received and not queued for sending yet.
    held: [Cell<bool>; 2],
    /// Which way something went last, and when.
    last: Cell<Option<Way>>,
    last_ns: Cell<u64>,
}

impl Traffic {
    fn moved(&self) -> Transferred {
        let [a_to_b, b_to_a] = [&self.bytes[0], &self.bytes[1]].map(Cell::get);
        Transferred { a_to_b, b_to_a }
    }

    fn received(&self, way: Way, now_ns: u64) {
        self.held[way as usize].set(true);
        self.last.set(Some(way));
        self.last_ns.set(now_ns);
    }

    fn passed_on(&self, way: Way, bytes: usize, now_ns: u64) {
        self.held[way as usize].set(false);
        self.bytes[way as usize].set(self.bytes[way as usize].get() + bytes as u64);
        self.last_ns.set(now_ns);
    }
}

/// Passes on what comes until it ends.
async fn pump(from: &mut ReadHalf, to: &Link, way: Way, traffic: &Traffic) -> Result<End> {
    let blame = |side: &'static str| move |error: Error| error.during(side);
    let (source, sink) = match way {
        Way::There => ("receive from the first connection", "send to the second connection"),
        Way::Back => ("receive from the second connection", "send to the first connection"),
    };
    while let Some(chunk) = from.recv().await.map_err(blame(source))? {
        let bytes = chunk.len();
        traffic.received(way, to.core.borrow_mut().now_ns);
        let send = to.send(SendBuf::from(chunk));
        patiently(from.link.id, &to.core, send).await.map_err(blame(sink))?;
        traffic.passed_on(way, bytes, to.core.borrow_mut().now_ns);
    }
    let ended = to.core.borrow_mut().table.get(from.link.id).is_some_and(|entry| entry.eof);
    if !ended {
        return Ok(End::Dismissed);
    }
    patiently(from.link.id, &to.core, to.shutdown()).await.map_err(blame(sink))?;
    Ok(End::Finished)
}

/// Waits until the other connection takes something, and keeps the one that it came from excused
/// meanwhile.
async fn patiently<F>(from: Id, core: &CoreRef, taken: F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let mut taken = pin!(taken);
    let mut pause: Option<Sleep> = None;
    poll_fn(|cx| {
        if let Poll::Ready(result) = taken.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        loop {
            if let Some(pause) = &mut pause
                && Pin::new(pause).poll(cx).is_pending()
            {
                return Poll::Pending;
            }
            let step = core.borrow_mut().excuse(from);
            pause = Some(sleep(step));
        }
    })
    .await
}

impl Core {
    /// A connection's handler is busy with another connection; how long until this has to be said
    /// again.
    fn excuse(&mut self, id: Id) -> Duration {
        let now_ms = self.now_ms;
        let kinds = [DeadlineKind::Handler, DeadlineKind::HalfClose];
        let limit_ms = kinds.map(|kind| self.limit_ms(id, kind)).into_iter().min();
        if let Some(entry) = self.table.get_mut(id) {
            entry.deadlines.told(now_ms);
        }
        Duration::from_millis((limit_ms.unwrap_or(0) / 4).max(1))
    }
}

/// Both directions at once.
struct Both<'a, T, B> {
    there: Pin<&'a mut T>,
    back: Pin<&'a mut B>,
    ends: [Option<End>; 2],
    traffic: &'a Traffic,
    links: [&'a Link; 2],
    /// Until what is left counts as over, unless something comes.
    pause: Option<Sleep>,
}

impl<T, B> Both<'_, T, B>
where
    T: Future<Output = Result<End>>,
    B: Future<Output = Result<End>>,
{
    async fn run(mut self) -> Result<()> {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.ends[0].is_none()
            && let Poll::Ready(end) = self.there.as_mut().poll(cx)
        {
            self.ends[0] = Some(end?);
        }
        if self.ends[1].is_none()
            && let Poll::Ready(end) = self.back.as_mut().poll(cx)
        {
            self.ends[1] = Some(end?);
        }
        match self.ends {
            [Some(_), Some(_)] => Poll::Ready(Ok(())),
            [Some(End::Dismissed), None] => self.poll_quiet(Way::Back, cx),
            [None, Some(End::Dismissed)] => self.poll_quiet(Way::There, cx),
            [None, None] => match self.retired_upstream() {
                Some(answers) => self.poll_quiet(answers, cx),
                None => Poll::Pending,
            },
            _ => Poll::Pending,
        }
    }

    /// The way of the answers of an outbound connection that has reached its greatest age, if one
    /// has: nobody else tells it to leave.
    fn retired_upstream(&self) -> Option<Way> {
        let core = self.links[0].core.borrow_mut();
        let retired = |link: &Link| {
            let entry = core.table.get(link.id);
            entry.is_some_and(|entry| entry.is_outbound() && entry.deadlines.is_retired())
        };
        let ways = [Way::There, Way::Back].into_iter();
        ways.zip(self.links).find(|(_, link)| retired(link)).map(|(way, _)| way)
    }

    /// One side has said all that it may. What comes back to it is over when it has paused for
    /// long enough; nothing is, while the last word was the side's own.
    fn poll_quiet(&mut self, way: Way, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let answers = self.traffic.last.get().is_none_or(|last| last == way);
        if !answers || self.traffic.held[way as usize].get() {
            return Poll::Pending;
        }
        loop {
            let (now_ns, grace_ns) = {
                let core = self.links[0].core.borrow_mut();
                (core.now_ns, core.settings.new_grace_ms * NS_PER_MS)
            };
            let over_ns = self.traffic.last_ns.get().saturating_add(grace_ns);
            if over_ns <= now_ns {
                return Poll::Ready(Ok(()));
            }
            let pause = self.pause.insert(sleep(Duration::from_nanos(over_ns - now_ns)));
            if Pin::new(pause).poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

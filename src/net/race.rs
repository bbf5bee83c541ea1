//! Several addresses of one host: happy eyeballs (RFC 8305).
//!
//! They are tried in turn, families alternating, the next one 250 ms after the last or as soon as
//! one has failed, until the first is established. The others are cancelled then.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use super::connect::describe;
use crate::bind::ListenAddr;
use crate::conn::Connection;
use crate::connecting::{Attempt, Failure};
use crate::core::CoreRef;
use crate::error::{Error, ErrorKind, Result};
use crate::route::Route;
use crate::time::{Sleep, sleep};

/// The attempts at the addresses of one host.
pub(super) struct Race<'a> {
    core: &'a CoreRef,
    from: Option<SocketAddr>,
    deadline_ms: u64,
    /// Not tried yet.
    waiting: VecDeque<SocketAddr>,
    running: Vec<(Route, Attempt)>,
    failures: Vec<(Route, Failure)>,
    /// Until the next one is tried, though no other has failed.
    pause: Option<Sleep>,
}

impl<'a> Race<'a> {
    pub(super) fn new(
        core: &'a CoreRef,
        addrs: &[SocketAddr],
        from: Option<SocketAddr>,
        deadline_ms: u64,
    ) -> Race<'a> {
        let waiting = alternate(addrs);
        let (running, failures) = (Vec::new(), Vec::new());
        Race { core, from, deadline_ms, waiting, running, failures, pause: None }
    }

    /// The first connection that is established.
    pub(super) async fn first(mut self) -> Result<Connection> {
        let won = poll_fn(|cx| self.poll(cx)).await;
        won.ok_or_else(|| self.error())
    }

    /// `None` when all have failed.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Connection>> {
        loop {
            let mut n = 0;
            while let Some((_, attempt)) = self.running.get_mut(n) {
                match Pin::new(attempt).poll(cx) {
                    Poll::Ready(Ok(connection)) => return Poll::Ready(Some(connection)),
                    Poll::Ready(Err(failure)) => {
                        let (route, _) = self.running.remove(n);
                        self.failures.push((route, failure));
                        self.pause = None;
                    }
                    Poll::Pending => n += 1,
                }
            }
            let paused = match &mut self.pause {
                Some(pause) => Pin::new(pause).poll(cx).is_pending(),
                None => false,
            };
            if paused {
                return Poll::Pending;
            }
            let Some(addr) = self.waiting.pop_front() else {
                let over = self.running.is_empty();
                return if over { Poll::Ready(None) } else { Poll::Pending };
            };
            self.begin(addr);
        }
    }

    fn begin(&mut self, addr: SocketAddr) {
        let route = Route { to: ListenAddr::Tcp(addr), from: self.from };
        match Attempt::begin(self.core, &route, self.deadline_ms) {
            Ok(attempt) => {
                self.running.push((route, attempt));
                self.pause = Some(sleep(ATTEMPT_DELAY)).filter(|_| !self.waiting.is_empty());
            }
            Err(failure) => self.failures.push((route, failure)),
        }
    }

    /// Every address with what has come of it.
    fn error(&self) -> Error {
        let mut errors = self.failures.iter().map(|(route, f)| describe(self.core, route, *f));
        if self.failures.len() == 1
            && let Some(error) = errors.next()
        {
            return error;
        }
        let errors: Vec<Error> = errors.collect();
        let kind = errors.first().map_or(ErrorKind::Io, Error::kind);
        let kind = if errors.iter().all(|e| e.kind() == kind) { kind } else { ErrorKind::Io };
        let all: Vec<String> = errors.iter().map(Error::to_string).collect();
        Error::new(kind, format!("connect to one of {} addresses", all.len()))
            .because(all.join("; "))
    }
}

/// The families in turn, beginning with that of the first; the order within each stays (RFC 8305,
/// 4, with one address of the first family ahead).
fn alternate(addrs: &[SocketAddr]) -> VecDeque<SocketAddr> {
    let first_is_v6 = addrs.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<SocketAddr>, Vec<SocketAddr>) =
        addrs.iter().copied().partition(|addr| addr.is_ipv6() == first_is_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut mixed = VecDeque::with_capacity(addrs.len());
    while mixed.len() < addrs.len() {
        mixed.extend(first.next().into_iter().chain(second.next()));
    }
    mixed
}

/// The connection attempt delay that RFC 8305, 5 recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate_and_keep_their_order() {
        let addrs = |texts: &[&str]| -> Vec<SocketAddr> {
            texts.iter().map(|text| text.parse().expect("an address")).collect()
        };
        for (given, mixed) in [
            (vec![], vec![]),
            (vec!["[::1]:1", "[::1]:2", "1.0.0.1:1"], vec!["[::1]:1", "1.0.0.1:1", "[::1]:2"]),
            (vec!["1.0.0.1:1", "1.0.0.1:2"], vec!["1.0.0.1:1", "1.0.0.1:2"]),
            (
                vec!["1.0.0.1:1", "[::1]:1", "[::1]:2", "[::1]:3"],
                vec!["1.0.0.1:1", "[::1]:1", "[::1]:2", "[::1]:3"],
            ),
        ] {
            assert_eq!(alternate(&addrs(&given)), addrs(&mixed));
        }
    }
}

//! Taking over completions: what each says, and what it gives back.
//!
//! Two of them come with each request, which are inlined into the core's loop.

use std::os::fd::{FromRawFd, OwnedFd};

use io_uring::cqueue;

use super::Uring;
use crate::driver::{Completion, Errno, Group, Outcome, Queue, Socket};
use crate::token::{Kind, Token};

impl Uring {
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.uring.completion().next()?;
            self.counters.completions += 1;
            let last = !cqueue::more(entry.flags());
            self.in_flight -= usize::from(last);
            let token = Token::from_bits(entry.user_data());
            let outcome = match token.kind() {
                Some(Kind::Receive) => Some(self.received(Group::Small, &entry)),
                Some(Kind::Send) => self.sent(token, last, &entry),
                kind => self.outcome(token, kind, last, &entry),
            };
            if let Some(outcome) = outcome {
                return Some(Completion { token, last, outcome });
            }
        }
    }

    #[inline(always)]
    fn received(&self, group: Group, entry: &cqueue::Entry) -> Outcome {
        let result = result(entry);
        // A buffer that the kernel has picked is ours again, whatever else the completion says.
        let lease = cqueue::buffer_select(entry.flags()).and_then(|buffer| {
            let pool = self.bufs.get(group as usize)?.pool();
            let lease = pool.lease(buffer, result.unwrap_or(0) as u32)?;
            Some(lease.leaving_some(cqueue::sock_nonempty(entry.flags())))
        });
        Outcome::Received(match result {
            Ok(0) => Ok(None),
            // Bytes without a buffer would be bytes lost: the stream is broken.
            Ok(_) => lease.map(Some).ok_or(Errno(libc::EIO)),
            Err(errno) => Err(errno),
        })
    }

    #[inline(always)]
    fn sent(&mut self, token: Token, last: bool, entry: &cqueue::Entry) -> Option<Outcome> {
        let sending = self.sends.get_mut(token.slot() as usize);
        match sending.and_then(|it| it.take_if(|sending| last && sending.token == token)) {
            Some(sending) => Some(Outcome::Sent(result(entry), sending.gather)),
            None => self.stale(),
        }
    }

    /// What any other completion carries. `None`: it is nobody else's business, or belongs to
    /// nothing that is in flight.
    fn outcome(
        &mut self,
        token: Token,
        kind: Option<Kind>,
        last: bool,
        entry: &cqueue::Entry,
    ) -> Option<Outcome> {
        let result = result(entry);
        Some(match kind {
            Some(Kind::File) => {
                self.files.settled(token, entry.result());
                return None;
            }
            Some(Kind::Timer) => {
                self.timer_ns = u64::MAX;
                return None;
            }
            Some(Kind::BulkReceive) => {
                self.bulk_receives -= usize::from(last);
                self.received(Group::Large, entry)
            }
            Some(Kind::Accept) => self.accepted(entry),
            Some(Kind::Hangup) => Outcome::Hangup(result.map(|events| events as i32)),
            Some(Kind::Doorbell) => {
                if last && !self.quiesced {
                    self.poll_doorbell();
                }
                Outcome::Doorbell
            }
            Some(Kind::Connect) if self.connects.end(token) => {
                Outcome::Connected(result.map(|_| ()))
            }
            Some(Kind::Cancel | Kind::CancelConnect) => Outcome::Cancelled(result.map(|_| ())),
            Some(Kind::CancelDatagrams) => Outcome::DatagramsCancelled(result.map(|_| ())),
            Some(Kind::ReceiveDatagrams | Kind::SendDatagram) => {
                match self.datagrams.outcome(token, entry, last) {
                    Some(outcome) => outcome,
                    None => return self.stale(),
                }
            }
            _ => return self.stale(),
        })
    }

    fn accepted(&self, entry: &cqueue::Entry) -> Outcome {
        let queue = match cqueue::sock_nonempty(entry.flags()) {
            _ if !self.ring.accepts_well => Queue::Unknown,
            true => Queue::More,
            false => Queue::Empty,
        };
        let socket = result(entry).map(|fd| {
            // SAFETY: a fresh descriptor, given to us by the accept and owned by nobody else.
            Socket::Os(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        });
        Outcome::Accepted(socket, queue)
    }

    #[cold]
    fn stale(&mut self) -> Option<Outcome> {
        self.counters.stale += 1;
        None
    }
}

/// What a completion says of its operation.
#[inline]
fn result(entry: &cqueue::Entry) -> Result<usize, Errno> {
    let result = entry.result();
    usize::try_from(result).map_err(|_| Errno(-result))
}

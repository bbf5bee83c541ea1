//! Does the kernel do what the driver rests on? Tried on a socket pair before a server starts:
//! version strings lie, since vendors bring features back and break others.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use crate::driver::{Completion, Driver, Errno, Group, Op, Outcome, Socket, Wait};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::Facts;
use crate::refusal;
use crate::sys::clock::Epoch;
use crate::sys::gather::Gather;
use crate::sys::uring::{RingSetup, Uring};
use crate::sys::wake::EventFd;
use crate::token::{Kind, Token};

/// Steps: 1. a multishot receive delivers two writes, each into a buffer of its own; 2. it ends
/// with ENOBUFS when the buffers are out; 3. armed again, it goes on with a returned buffer; 4. a
/// send reports its bytes; 5. a cancelled receive says so; 6. the end of the stream ends a receive;
/// 7. the bell is heard.
///
/// It runs on a thread of its own: what the kernel does to close a ring it does on the thread that
/// made it, where it would interrupt the caller's system calls.
pub(crate) fn check() -> Result<()> {
    let trial = thread::Builder::new().name("slipring-trial".to_owned()).spawn(try_out);
    let trial = trial.map_err(|error| Error::os("start a thread", error))?;
    trial.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Panicked, "try out io_uring")))
}

fn try_out() -> Result<()> {
    let bell = eventfd()?;
    let mut trial = Trial { driver: driver(&bell)?, seen: Vec::new() };
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| Error::os("make a socket pair", error))?;
    let ours = Socket::Os(OwnedFd::from(ours));
    let write = |byte: u8| {
        (&theirs).write_all(&[byte; 8]).map_err(|error| Error::os("write to a socket pair", error))
    };
    let receive = || Op::Receive { socket: ours.name(), once: false, group: Group::Small };

    let mut leases = Vec::new();
    trial.driver.push(RECEIVE, receive());
    for byte in 0..BUFFERS as u8 {
        write(byte)?;
        match trial.next(RECEIVE)? {
            Completion { last, outcome: Outcome::Received(Ok(Some(lease))), .. }
                if *lease == [byte; 8] =>
            {
                if last {
                    trial.driver.push(RECEIVE, receive());
                }
                leases.push(lease);
            }
            other => return Err(unexpected("multishot receive into provided buffers", &other)),
        }
    }
    write(99)?;
    match trial.next(RECEIVE)? {
        Completion {
            last: true, outcome: Outcome::Received(Err(Errno(libc::ENOBUFS))), ..
        } => {}
        other => return Err(unexpected("a receive without buffers", &other)),
    }
    leases.clear();
    trial.driver.push(RECEIVE, receive());
    match trial.next(RECEIVE)? {
        Completion { outcome: Outcome::Received(Ok(Some(lease))), .. } if *lease == [99; 8] => {}
        other => return Err(unexpected("a receive with a returned buffer", &other)),
    }

    let mut gather = Box::new(Gather::new());
    gather.write(b"answer");
    trial.driver.push(SEND, Op::Send { socket: ours.name(), gather });
    match trial.next(SEND)? {
        Completion { last: true, outcome: Outcome::Sent(Ok(6), _), .. } => {}
        other => return Err(unexpected("a send", &other)),
    }

    trial.driver.push(CANCEL, Op::Cancel { target: RECEIVE });
    match trial.next(RECEIVE)? {
        Completion { last: true, outcome: Outcome::Received(Err(_)), .. } => {}
        other => return Err(unexpected("a cancelled receive", &other)),
    }

    theirs
        .shutdown(Shutdown::Write)
        .map_err(|error| Error::os("shut down a socket pair", error))?;
    trial.driver.push(RECEIVE, receive());
    match trial.next(RECEIVE)? {
        Completion { last: true, outcome: Outcome::Received(Ok(None)), .. } => {}
        other => return Err(unexpected("the end of a stream", &other)),
    }

    bell.ring();
    trial.next(Token::new(Kind::Doorbell, 0, 0)).map(drop)
}

/// A ring and what it has said so far.
struct Trial {
    driver: Driver,
    seen: Vec<Completion>,
}

impl Trial {
    /// The next completion of an operation; those of others are kept.
    fn next(&mut self, token: Token) -> Result<Completion> {
        for _ in 0..TRIES {
            if let Some(at) = self.seen.iter().position(|seen| seen.token == token) {
                return Ok(self.seen.remove(at));
            }
            let wait = Wait::Until(self.driver.now_ns() + TRY_NS);
            self.driver.enter(wait).map_err(not_entered)?;
            self.seen.extend(std::iter::from_fn(|| self.driver.next()));
        }
        Err(Error::new(ErrorKind::Unsupported, format!("try out io_uring: {:?}", token.kind()))
            .because("the kernel did not answer within a second"))
    }
}

/// A profile may let rings be made and then forbid to use them.
fn not_entered(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => {
            refusal::explain(error, SETUP.asked(), &Facts::read())
        }
        _ => Error::os("io_uring_enter", error),
    }
}

fn driver(bell: &Arc<EventFd>) -> Result<Driver> {
    let make = || Uring::new(SETUP, Arc::clone(bell), Epoch::now());
    match refusal::retry_without_memory(make) {
        Ok(uring) => Ok(Driver::Uring(Box::new(uring))),
        Err(error) => Err(refusal::explain(error, SETUP.asked(), &Facts::read())),
    }
}

fn eventfd() -> Result<Arc<EventFd>> {
    EventFd::new().map(Arc::new).map_err(|error| Error::os("create an eventfd", error))
}

fn unexpected(what: &str, got: &Completion) -> Error {
    Error::new(ErrorKind::Unsupported, format!("try out io_uring: {what}")).because(format!(
        "the kernel answered {:?}, which no kernel from {} on should; try another kernel",
        got.outcome,
        refusal::NEEDED_TEXT
    ))
}

const RECEIVE: Token = Token::new(Kind::Receive, 0, 0);
const SEND: Token = Token::new(Kind::Send, 0, 0);
const CANCEL: Token = Token::new(Kind::Cancel, 0, 0);
const BUFFERS: u16 = 2;
const SETUP: RingSetup = RingSetup {
    sq_entries: 8,
    cq_entries: 32,
    buffers: BUFFERS,
    buffer_bytes: 64,
    large_buffers: 0,
    large_buffer_bytes: 0,
    files: 0,
};
const TRIES: usize = 100;
const TRY_NS: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no io_uring")]
    fn a_kernel_that_gives_rings_behaves_as_the_driver_expects() {
        match check() {
            Ok(()) => {}
            // Only a kernel or a sandbox that gives no rings at all may stand in the way.
            Err(error) => assert!(error.to_string().starts_with("set up an io_uring"), "{error}"),
        }
    }
}

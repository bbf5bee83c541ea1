//! How the cores list their connections for whoever asks: each answers in pieces, one per turn.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::conn::ConnectionId;
use crate::connections::{ConnectionInfo, ConnectionState, Connections, Direction, SilentCore};
use crate::control::Control;
use crate::core::{Core, CoreCell};
use crate::driver::Socket;
use crate::entry::{Entry, Receive};
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::local::is_core_thread;
use crate::post::Message;
use crate::table::Id;
use crate::walk::Walk;

/// What somebody has asked all cores.
#[derive(Debug)]
pub(crate) struct Inquiry {
    answers: Mutex<Answers>,
    news: Condvar,
}

#[derive(Debug)]
struct Answers {
    parts: Vec<Option<Vec<ConnectionInfo>>>,
    waker: Option<Waker>,
    /// The asker has given up.
    closed: bool,
}

/// An inquiry as it is sent to one core. Dropped without an answer, as by a core that is ending,
/// it says that there are no connections.
#[derive(Debug)]
pub(crate) struct Question {
    inquiry: Arc<Inquiry>,
    core: usize,
}

/// A question that a core is about to answer.
#[derive(Debug)]
pub(crate) struct Inspection {
    question: Question,
    walk: Option<Walk>,
    found: Vec<ConnectionInfo>,
}

impl Inquiry {
    /// Asks every core of the server.
    fn put(control: &Control) -> Arc<Inquiry> {
        let seats = control.seats();
        let parts = seats.iter().map(|_| None).collect();
        let answers = Mutex::new(Answers { parts, waker: None, closed: false });
        let inquiry = Arc::new(Inquiry { answers, news: Condvar::new() });
        for (core, seat) in seats.iter().enumerate() {
            let question = Question { inquiry: Arc::clone(&inquiry), core };
            // A core that has ended gives the question back, whose drop is the answer.
            let _ = seat.post.post(Message::Inspect(question));
        }
        inquiry
    }

    /// Waits until all have answered, or the time is up.
    fn wait(&self, until: Instant) {
        let mut answers = self.lock();
        while !answers.are_complete() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.news.wait_timeout(answers, left);
            answers = waited.map_or_else(|poison| poison.into_inner().0, |(guard, _)| guard);
        }
    }

    /// What has been answered, and who has not.
    fn close(&self, control: &Control) -> Connections {
        let parts = self.give_up();
        let mut connections = Connections::default();
        for (core, (part, seat)) in parts.into_iter().zip(control.seats()).enumerate() {
            match part {
                Some(mut infos) => connections.infos.append(&mut infos),
                None => connections.silent.push(SilentCore {
                    core,
                    connections: seat.counters.live.get(),
                    running: seat.counters.running.get(),
                }),
            }
        }
        connections
    }

    /// From now on nothing is kept for the asker. Returns what has been answered.
    fn give_up(&self) -> Vec<Option<Vec<ConnectionInfo>>> {
        let (parts, waker) = {
            let mut answers = self.lock();
            answers.closed = true;
            (std::mem::take(&mut answers.parts), answers.waker.take())
        };
        drop(waker);
        parts
    }

    /// A core's answer, and who waits for it.
    fn answer(&self, core: usize, infos: Vec<ConnectionInfo>) -> Option<Waker> {
        let mut answers = self.lock();
        if let Some(part @ None) = answers.parts.get_mut(core) {
            *part = Some(infos);
        }
        self.news.notify_all();
        answers.waker.take()
    }

    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Answers {
    fn are_complete(&self) -> bool {
        self.parts.iter().all(Option::is_some)
    }
}

/// Who asks, and may be dropped before the last core has answered.
struct Asker<'a>(&'a Inquiry);

impl Drop for Asker<'_> {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

impl Question {
    fn answer(&self, infos: Vec<ConnectionInfo>) {
        if let Some(waker) = self.inquiry.answer(self.core, infos) {
            waker.wake();
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.answer(Vec::new());
    }
}

impl Handle {
    /// Lists every connection of the server: what it is at, for how long, and what it waits for.
    ///
    /// Each core lists a few hundred connections a turn, so a list of many is not of one moment,
    /// but has every connection once that was there all the time. A core that does not answer
    /// within a second is among [`Connections::silent_cores`]; one that has ended has no
    /// connections.
    ///
    /// # Errors
    /// [`ErrorKind::Misuse`] on a core of a server, which would wait for itself.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use slipring::ConnectionState;
    ///
    /// # fn example(handle: slipring::Handle) -> slipring::Result<()> {
    /// for info in handle.connections()?.in_state(ConnectionState::Sending).by_age() {
    ///     eprintln!("{:?} has not taken {} bytes", info.peer, info.bytes_queued);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn connections(&self) -> Result<Connections> {
        if is_core_thread() {
            return Err(Error::new(ErrorKind::Misuse, "list the connections")
                .because("a core would wait for itself; ask from another thread"));
        }
        let inquiry = Inquiry::put(self.control());
        inquiry.wait(Instant::now() + PATIENCE);
        Ok(inquiry.close(self.control()))
    }
}

/// As [`Handle::connections`], from a task of one of the cores.
#[cfg_attr(not(any(test, feature = "admin")), expect(dead_code, reason = "the admin listener's"))]
pub(crate) async fn inspect(control: &Control) -> Connections {
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;

    let inquiry = Inquiry::put(control);
    let _asker = Asker(&inquiry);
    let mut late = pin!(crate::time::sleep(PATIENCE));
    poll_fn(|cx| {
        let mut answers = inquiry.lock();
        if answers.are_complete() {
            return Poll::Ready(());
        }
        let before = answers.waker.replace(cx.waker().clone());
        drop(answers);
        drop(before);
        late.as_mut().poll(cx)
    })
    .await;
    inquiry.close(control)
}

/// The questions of one core, first come first served.
#[derive(Debug, Default)]
pub(crate) struct Inspections(VecDeque<Inspection>);

impl Inspections {
    pub(crate) fn push(&mut self, question: Question) {
        self.0.push_back(Inspection { question, walk: None, found: Vec::new() });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Core {
    /// Lists the next piece of the table for whoever has asked first. Returns the inspection when
    /// it is complete; its answer wakes anyone's waker, so it is given when the core is free.
    fn inspect_piece(&mut self) -> Option<Inspection> {
        let mut inspection = self.inspections.0.pop_front()?;
        if inspection.question.inquiry.lock().closed {
            return Some(inspection);
        }
        let slots = self.table.slots();
        let walk = inspection.walk.get_or_insert_with(|| Walk::over(slots));
        inspection.found.reserve(self.table.len().saturating_sub(inspection.found.len()));
        for index in walk.piece(PIECE) {
            let id = self.table.id_at(index);
            let info = id.and_then(|id| self.connection_info(inspection.question.core, id));
            inspection.found.extend(info);
        }
        if walk.is_done() {
            return Some(inspection);
        }
        self.inspections.0.push_front(inspection);
        None
    }

    pub(crate) fn connection_info(&self, core: usize, id: Id) -> Option<ConnectionInfo> {
        let entry = self.table.get(id)?;
        let since = |ms: u64| Duration::from_millis(self.now_ms.saturating_sub(ms));
        let (at_ms, deadline) = entry.deadlines.first(&self.limits, entry.waits());
        let left = |at_ms: u64| Duration::from_millis(at_ms.saturating_sub(self.now_ms));
        let running = entry.deadlines.running(&self.limits, entry.waits());
        Some(ConnectionInfo {
            id: ConnectionId { core: self.serial(), id },
            core,
            peer: entry.socket.as_ref().and_then(Socket::peer_addr),
            direction: if entry.is_outbound() { Direction::Outbound } else { Direction::Inbound },
            listener: self.control.addr(entry.listener),
            state: entry.state(),
            ended: entry.ended,
            age: since(entry.deadlines.accepted_ms()),
            without_progress: since(entry.deadlines.progress_ms()),
            bytes_in: entry.bytes_in,
            bytes_out: entry.bytes_out,
            bytes_unread: entry.input_bytes() as u64,
            bytes_queued: entry.queued_bytes() as u64,
            deadline,
            deadline_in: left(at_ms),
            deadlines: running.map(|(at_ms, kind)| (kind, left(at_ms))).collect(),
            children: entry.company.as_ref().map_or(0, |company| company.children.len()),
            handler: entry.handler.and_then(|task| self.tasks.place(task)),
        })
    }
}

impl CoreCell {
    /// Answers who has asked for the connections, as far as one turn allows.
    pub(crate) fn inspect(&self) {
        let complete = {
            let mut core = self.borrow_mut();
            if core.inspections.is_empty() {
                return;
            }
            core.inspect_piece()
        };
        if let Some(Inspection { question, found, .. }) = complete {
            question.answer(found);
        }
    }
}

impl Entry {
    /// What the connection is at.
    pub(crate) fn state(&self) -> ConnectionState {
        let paused = matches!(self.receive, Receive::Off | Receive::Cancelling | Receive::Parked);
        if self.ended.is_some() {
            ConnectionState::Ended
        } else if self.queued_bytes() > 0 {
            ConnectionState::Sending
        } else if self.is_closing() {
            ConnectionState::Lingering
        } else if paused {
            ConnectionState::Paused
        } else if self.eof {
            ConnectionState::HalfClosed
        } else if !self.deadlines.has_first_byte() {
            ConnectionState::New
        } else if !self.waits() {
            ConnectionState::Busy
        } else if self.deadlines.is_in_message() {
            ConnectionState::Receiving
        } else {
            ConnectionState::Idle
        }
    }
}

/// What a core lists at this moment, whatever turn it is.
#[cfg(test)]
pub(crate) fn list_now(core: &CoreCell, control: &Control) -> Connections {
    let parts = control.seats().iter().map(|_| None).collect();
    let answers = Mutex::new(Answers { parts, waker: None, closed: false });
    let inquiry = Arc::new(Inquiry { answers, news: Condvar::new() });
    let question = Question { inquiry: Arc::clone(&inquiry), core: 0 };
    core.borrow_mut().inspections.push(question);
    while !core.borrow_mut().inspections.is_empty() {
        core.inspect();
    }
    inquiry.close(control)
}

/// How long a core has to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Slots of the table that are looked at in one turn; a connection costs about a microsecond.
const PIECE: usize = 512;

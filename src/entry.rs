//! What a core knows of one connection.

use crate::deadline::Deadlines;
use crate::driver::Socket;
use crate::executor::Wake;
use crate::input::Input;
use crate::per_ip::Source;
use crate::report::CloseReason;
use crate::sizing::Sizing;
use crate::sys::gather::Gather;
use crate::table::Id;
use crate::wheel::TimerKey;

/// One connection, from accept to close.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Open until nothing is in flight; gone while an ended connection waits for its handler.
    pub(crate) socket: Option<Socket>,
    /// Operations that have not had their last completion.
    pub(crate) in_flight: u8,
    pub(crate) receive: Receive,
    /// It has waited for buffers, and got nothing since.
    pub(crate) rearmed: bool,
    /// Its receive ends with every answer.
    pub(crate) receives_once: bool,
    pub(crate) sizing: Sizing,
    /// The poll for a broken connection, while the receive is paused or waits for buffers.
    pub(crate) hangup: Hangup,
    /// The peer has ended its side.
    pub(crate) eof: bool,
    /// Its owner has said that it sends no more: our end follows the output.
    pub(crate) finishing: bool,
    /// We have ended ours.
    pub(crate) fin_sent: bool,
    /// Output was on its way when we ended our side.
    pub(crate) unacknowledged: bool,
    /// Input that came after the handler had finished.
    pub(crate) unread_seen: bool,
    pub(crate) linger: Linger,

    /// Received and not yet taken; nothing while that is nothing, as it is most of the time.
    pub(crate) input: Option<Box<Input>>,
    /// What is queued behind the send in flight.
    pub(crate) output: Option<Box<Gather>>,
    /// How much the send in flight carries; 0 when none is.
    pub(crate) sending_bytes: usize,
    /// On the list of those that wait for memory.
    pub(crate) wants_memory: bool,
    /// On the list of those to be flushed at the end of the turn.
    pub(crate) dirty: bool,

    /// Who waits for input.
    pub(crate) reader: Wake,

    /// Why it was ended, if not by its handler.
    pub(crate) ended: Option<CloseReason>,
    /// It ends with a reset: a FIN would say to the peer that it got everything.
    pub(crate) resets: bool,
    /// What it carries is another connection's too, so that a deadline is no clean end for it.
    pub(crate) tied: bool,
    /// Why its handler ended it, if not by success.
    pub(crate) failed: Option<CloseReason>,
    /// Its handler had finished before the peer did.
    pub(crate) served: bool,
    /// Its protocol layer has requests at work, so that who listens for more is not idle.
    pub(crate) busy: bool,
    /// It is idle, and the drain will close it when its time has come.
    pub(crate) farewell: bool,
    /// Its protocol layer is told when it has been idle for too long, and ends it by itself.
    pub(crate) says_farewell: bool,
    /// It was told, and nothing has happened since.
    pub(crate) idle_over: bool,
    /// Its protocol layer has ended what was the last message: nothing behind that is read.
    pub(crate) had_its_last: bool,
    /// Why its handler was told that no more input comes, though the peer may have some.
    pub(crate) dismissed: Option<CloseReason>,
    /// How many holds there are on it, such as a [`Connection`](crate::Connection)'s halves; the
    /// last one closes.
    pub(crate) handles: u32,
    /// Which of its core's listeners has accepted it, or [`OUTBOUND`].
    pub(crate) listener: u16,

    /// Received in all, what was thrown away included.
    pub(crate) bytes_in: u64,
    /// Taken by the kernel in all.
    pub(crate) bytes_out: u64,

    pub(crate) deadlines: Deadlines,
    /// The one reminder in the wheel, and when it comes at the latest.
    pub(crate) timer: TimerKey,
    pub(crate) timer_ms: u64,

    pub(crate) handler: Option<Id>,
    pub(crate) company: Option<Box<Company>>,
}

/// What few connections have.
#[derive(Debug, Default)]
pub(crate) struct Company {
    /// What the handler has spawned to end with the connection.
    pub(crate) children: Vec<Id>,
    /// Whom it is counted for, while connections per address are limited.
    pub(crate) source: Option<Source>,
    /// Those of the core's drain waiters that wait for the connection's end as well.
    pub(crate) watchers: Vec<Id>,
    /// Who waits for room in the output queue, or for its end.
    pub(crate) writer: Wake,
    pub(crate) lingering: Option<Lingering>,
}

/// Where the receive of a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receive {
    /// Not armed; the kernel's buffer and then the peer's window fill up.
    Off,
    Armed,
    /// A cancellation is under way.
    Cancelling,
    /// Waits for receive buffers.
    Parked,
    /// Nothing will come any more.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hangup {
    Off,
    Armed,
    Cancelling,
}

/// Whether unread input is being read and thrown away before the close, which would otherwise
/// reset the connection and destroy what the peer has not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Linger {
    NotYet,
    Now,
    Done,
}

/// How far a linger has come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lingering {
    pub(crate) until_ms: u64,
    /// How much the peer had taken when that was last looked at.
    pub(crate) mark: u64,
    /// What was thrown away.
    pub(crate) bytes: u64,
}

impl Entry {
    pub(crate) fn new(socket: Socket, deadlines: Deadlines) -> Entry {
        Entry {
            socket: Some(socket),
            in_flight: 0,
            receive: Receive::Off,
            rearmed: false,
            receives_once: false,
            sizing: Sizing::new(),
            hangup: Hangup::Off,
            eof: false,
            finishing: false,
            fin_sent: false,
            unacknowledged: false,
            unread_seen: false,
            linger: Linger::NotYet,
            input: None,
            output: None,
            sending_bytes: 0,
            dirty: false,
            wants_memory: false,
            reader: Wake::Nobody,
            ended: None,
            resets: false,
            tied: false,
            failed: None,
            served: false,
            busy: false,
            farewell: false,
            says_farewell: false,
            idle_over: false,
            had_its_last: false,
            dismissed: None,
            handles: 1,
            listener: 0,
            bytes_in: 0,
            bytes_out: 0,
            deadlines,
            timer: TimerKey::NONE,
            timer_ms: 0,
            handler: None,
            company: None,
        }
    }

    /// Whether this end has established it.
    pub(crate) fn is_outbound(&self) -> bool {
        self.listener == OUTBOUND
    }

    /// No handle is left: what remains is to close it well.
    pub(crate) fn is_closing(&self) -> bool {
        self.handles == 0
    }

    /// Its company, which it has from now on.
    pub(crate) fn company(&mut self) -> &mut Company {
        self.company.get_or_insert_default()
    }

    /// The tasks that were spawned to end with it.
    pub(crate) fn take_children(&mut self) -> Vec<Id> {
        self.company
            .as_mut()
            .map(|company| std::mem::take(&mut company.children))
            .unwrap_or_default()
    }

    /// Forgets a task that has ended.
    pub(crate) fn forget_child(&mut self, task: Id) {
        if let Some(company) = &mut self.company {
            company.children.retain(|child| *child != task);
        }
    }

    /// Whoever waits for output to leave.
    pub(crate) fn take_writer(&mut self) -> Wake {
        self.company.as_mut().map(|company| std::mem::take(&mut company.writer)).unwrap_or_default()
    }

    pub(crate) fn lingering(&mut self) -> Option<&mut Lingering> {
        self.company.as_mut()?.lingering.as_mut()
    }

    /// Bytes that were received and no handler has taken.
    pub(crate) fn input_bytes(&self) -> usize {
        self.input.as_ref().map_or(0, |input| input.bytes())
    }

    /// Bytes that a handler has sent and the kernel has not taken.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.sending_bytes + self.output.as_ref().map_or(0, |gather| gather.bytes())
    }

    /// The one reason under which it is counted.
    pub(crate) fn reason(&self) -> CloseReason {
        let finished = if let Some(reason) = self.dismissed {
            reason
        } else if self.served {
            CloseReason::Served
        } else {
            CloseReason::Finished
        };
        self.ended.or(self.failed).unwrap_or(finished)
    }
}

// Each idle connection has one; the simulator's sockets take more.
#[cfg(not(test))]
const _: () = assert!(size_of::<Entry>() <= 224);

/// In place of a listener's number: it was not accepted.
pub(crate) const OUTBOUND: u16 = u16::MAX;

//! A core's calls: what it has asked others to run, the pool of threads for blocking work
//! included, and whose answer is still to come.
//!
//! A call goes out by a lane, of which there is one for each core and one for the pool. So many
//! may be under way on each; those behind them are sent as answers come back.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use crate::core::Core;
use crate::cores::Whom;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Wake;
use crate::post::{Message, Post};
use crate::table::{Id, Table};

/// The calls of one core.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    pub(crate) slots: Table<Slot>,
    lanes: Vec<Lane>,
}

/// A call that somebody waits for.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) wake: Wake,
    pub(crate) stage: Stage,
}

/// How far a call has come.
pub(crate) enum Stage {
    /// Its lane is full.
    Queued(Launch),
    UnderWay,
    Answered(Outcome),
}

/// Sends a call on its way.
pub(crate) type Launch = Box<dyn FnOnce(&mut Core, Reply)>;

/// What has become of a call.
pub(crate) type Outcome = std::result::Result<Box<dyn Any + Send>, Loss>;

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum Loss {
    Panicked,
    /// Whoever was to answer is gone: the core, or the task.
    Gone,
    Refused(Error),
}

/// An answer on its way back.
pub(crate) struct Answer {
    id: Id,
    /// Where it leaves room for the next.
    lane: Option<usize>,
    outcome: Outcome,
}

/// So many calls may go out by it still; who waits for that.
#[derive(Debug)]
pub(crate) struct Lane {
    room: usize,
    /// Some of them may have been given up.
    pub(crate) queue: VecDeque<Id>,
    /// Has a clone in each call that has gone past the lane and was not heard yet.
    unheard: Arc<()>,
}

impl Lane {
    fn new() -> Lane {
        Lane { room: UNDER_WAY_MAX, queue: VecDeque::new(), unheard: Arc::new(()) }
    }

    /// How many calls have gone past it that were not heard yet.
    pub(crate) fn unheard(&self) -> usize {
        Arc::strong_count(&self.unheard) - 1
    }
}

impl Calls {
    pub(crate) fn lane(&mut self, lane: usize) -> &mut Lane {
        if self.lanes.len() <= lane {
            self.lanes.resize_with(lane + 1, Lane::new);
        }
        &mut self.lanes[lane]
    }

    /// Queues a call. Of those given up there are never more than of the others, or a few.
    fn enqueue(&mut self, lane: usize, id: Id) {
        let queue = &mut self.lanes[lane].queue;
        if queue.len() >= 2 * self.slots.len().max(UNDER_WAY_MAX) {
            queue.retain(|queued| self.slots.get(*queued).is_some());
        }
        queue.push_back(id);
    }
}

impl Core {
    /// The lane of one more call.
    ///
    /// # Errors
    /// There is no such core, or too many calls are unanswered or unheard, whoever waits for them.
    pub(crate) fn admit_call(&mut self, whom: Whom) -> Result<usize> {
        let cores = self.control.seats().len();
        let (lane, exists) = match whom {
            Whom::Core(core) => (core, core < cores),
            #[cfg(feature = "blocking")]
            Whom::Pool => (cores, true),
        };
        let refused = |kind, why| Err(Error::new(kind, whom.operation()).because(why));
        if !exists {
            return refused(ErrorKind::Misuse, format!("the server has {cores} cores"));
        }
        if self.calls.slots.len() >= UNANSWERED_MAX {
            let why = format!("{UNANSWERED_MAX} calls of this core are unanswered");
            return refused(ErrorKind::Resource, why);
        }
        if self.calls.lane(lane).unheard() >= UNHEARD_MAX {
            let why = format!("{UNHEARD_MAX} that this core has spawned there are still unheard");
            return refused(ErrorKind::Resource, why);
        }
        Ok(lane)
    }

    /// Sends a call that was admitted, or queues it behind those that fill its lane; one that is
    /// not of a lane is sent in any case.
    pub(crate) fn begin_call<L>(&mut self, lane: usize, in_lane: bool, launch: L) -> Id
    where
        L: FnOnce(&mut Core, Reply) + 'static,
    {
        self.counters.calls.add(1);
        let id = self.calls.slots.insert(Slot { wake: Wake::Nobody, stage: Stage::UnderWay });
        if in_lane && self.calls.lane(lane).room == 0 {
            self.calls.enqueue(lane, id);
            if let Some(slot) = self.calls.slots.get_mut(id) {
                slot.stage = Stage::Queued(Box::new(launch));
            }
        } else {
            let reply = self.reply(id, lane, in_lane);
            launch(self, reply);
        }
        id
    }

    /// Nobody waits for this call any more. Returns what is left of it, to be dropped where the
    /// core is not borrowed.
    pub(crate) fn forget_call(&mut self, id: Id) -> Option<Stage> {
        let Slot { wake, stage } = self.calls.slots.remove(id)?;
        self.tasks.discard(Some(wake));
        if !matches!(stage, Stage::Answered(_)) {
            self.counters.calls_dropped.add(1);
        }
        Some(stage)
    }

    /// An answer has come. Returns it when nobody waits for it any more, to be dropped likewise.
    pub(crate) fn take_answer(&mut self, answer: Answer) -> Option<Outcome> {
        let Answer { id, lane, outcome } = answer;
        if let Some(lane) = lane {
            self.give_room(lane);
        }
        let Some(slot) = self.calls.slots.get_mut(id) else { return Some(outcome) };
        match outcome {
            Ok(_) => self.counters.calls_answered.add(1),
            Err(_) => self.counters.calls_failed.add(1),
        }
        slot.stage = Stage::Answered(outcome);
        self.tasks.wake(&mut slot.wake);
        None
    }

    /// Sends the next of a lane, as there is room.
    fn give_room(&mut self, number: usize) {
        self.calls.lane(number).room += 1;
        while let Some(id) = self.calls.lane(number).queue.pop_front() {
            let Some(slot) = self.calls.slots.get_mut(id) else { continue };
            let Stage::Queued(launch) = std::mem::replace(&mut slot.stage, Stage::UnderWay) else {
                continue;
            };
            let reply = self.reply(id, number, true);
            launch(self, reply);
            return;
        }
    }

    /// What answers a call that is sent now.
    fn reply(&mut self, id: Id, number: usize, in_lane: bool) -> Reply {
        let lane = self.calls.lane(number);
        lane.room -= usize::from(in_lane);
        Reply {
            to: Post::clone(&self.post),
            id,
            lane: in_lane.then_some(number),
            unheard: (!in_lane).then(|| Arc::clone(&lane.unheard)),
            sent: false,
        }
    }
}

/// Who is to answer a call has this, and whoever drops it has answered, too: no call waits for a
/// core that is gone, a closure that was never run or one that has panicked.
#[derive(Debug)]
pub(crate) struct Reply {
    to: Post,
    id: Id,
    lane: Option<usize>,
    /// Of one that is not of a lane, until it is heard.
    unheard: Option<Arc<()>>,
    sent: bool,
}

impl Reply {
    /// The call has come to whom it is for.
    pub(crate) fn is_heard(&mut self) {
        self.unheard = None;
    }

    /// Answers from a core: it leaves with whatever else goes to the caller's.
    pub(crate) fn send_from(mut self, core: &mut Core, outcome: Outcome) {
        let message = self.answer(outcome);
        core.outbox.push(&self.to, message);
    }

    /// Answers from any thread, at once.
    #[cfg(feature = "blocking")]
    pub(crate) fn send(mut self, outcome: Outcome) {
        self.post(outcome);
    }

    fn answer(&mut self, outcome: Outcome) -> Message {
        self.sent = true;
        Message::Answer(Answer { id: self.id, lane: self.lane, outcome })
    }

    fn post(&mut self, outcome: Outcome) {
        let message = self.answer(outcome);
        // A caller that is gone needs no answer.
        let _ = self.to.post(message);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            let panicked = std::thread::panicking();
            self.post(Err(if panicked { Loss::Panicked } else { Loss::Gone }));
        }
    }
}

impl Loss {
    /// The error of a call to `whom`, named as in `call core 2`.
    pub(crate) fn into_error(self, operation: String) -> Error {
        match self {
            Loss::Panicked => Error::new(ErrorKind::Panicked, operation)
                .because("what it was to run has panicked"),
            Loss::Gone => Error::new(ErrorKind::Closed, operation).because(
                "the core has ended, or its drain's deadline has come before there was an answer",
            ),
            Loss::Refused(error) => error,
        }
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Queued(_) => "Queued",
            Stage::UnderWay => "UnderWay",
            Stage::Answered(_) => "Answered",
        })
    }
}

/// Calls to one core, or of the pool, that one core may have under way; more wait for their turn.
pub(crate) const UNDER_WAY_MAX: usize = 256;
/// Calls of one core that may wait for their answers in all; more are refused.
const UNANSWERED_MAX: usize = 65_536;
/// Futures that one core may have spawned on another which has not heard of them.
const UNHEARD_MAX: usize = 65_536;

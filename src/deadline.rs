//! Which deadlines a connection has. Pure: it is told the time, in milliseconds.
//!
//! A connection has one entry in the wheel, for the earliest moment at which something may have to
//! be done. Activity only stores a timestamp; an entry that fires before its deadline is put back.
//! So a request costs no wheel operation, and yet every connection has a deadline at every moment:
//! each can be set, but none can be taken away.
//!
//! Whether a handler waits for input or does something else decides between [`DeadlineKind::Idle`]
//! and [`DeadlineKind::Handler`]. It changes with every request and nobody is told, so each of the
//! two is looked at again before it could have passed if the other had begun just now.

mod limits;
mod next;
#[cfg(test)]
mod tests;
mod turns;

pub use self::limits::DeadlineKind;
pub(crate) use self::limits::Limits;
pub(crate) use self::next::{Expired, Moment, Next};
use crate::pace::Pace;

/// Who has opened the message that is being received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// A call that reads a whole one.
    ByRead,
    /// The protocol layer.
    ByLayer,
}

/// What a look at the output has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// Nothing was taken for too long.
    Stalled,
    /// Less was taken than the least rate asks for.
    TooSlow,
}

/// The times of one connection, as few as each of ten thousand idle ones needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Deadlines {
    accepted_ms: u64,
    /// The last byte in either direction, or the accept.
    progress_ms: u64,
    /// When the handler began to wait for input, or was told of something else than input.
    turned_ms: u64,
    /// When the message that is being received began, if one is, and how much had been received
    /// before it.
    message_ms: u64,
    message_bytes: u64,
    /// When output was last known to make progress, while some is queued or on its way, and how
    /// much the peer had taken before that began.
    output_ms: u64,
    output_bytes: u64,
    last_stage: Option<Expired>,
    last_stage_ms: u64,
    rare: Option<Box<Rare>>,
    /// Where it stands among all connections, to spread what would come to all at once.
    jitter: u16,
    /// For how long nobody has waited for the message's bytes, since it was last looked at.
    unawaited_ms: u16,
    /// For how long the handler had waited for input when it gave that up.
    waited_ms: u32,
    opened: Opened,
    first_byte_seen: bool,
    half_closed: bool,
    /// Whoever is idle stays so whatever bytes go back and forth.
    ignores_bytes: bool,
}

/// What few connections have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rare {
    /// The limits that the handler has set, with those that it has not.
    own: Option<Box<[u64; DeadlineKind::ALL.len()]>>,
    /// How a message comes that was looked at.
    input: Option<Pace>,
    /// There when a look has found the peer behind.
    output: Option<Backlog>,
    heartbeat: Option<Heartbeat>,
    /// When a retired connection is ended.
    retired_until_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Backlog {
    acknowledged: u64,
    /// What was there to be taken at the last look.
    goal: u64,
    pace: Pace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Heartbeat {
    /// The last byte received, or the accept.
    heard_ms: u64,
    asked_ms: Option<u64>,
    /// Not before then, as it could not be asked before.
    not_before_ms: u64,
}

impl Deadlines {
    /// `jitter` spreads what would otherwise come to all connections at once.
    pub(crate) fn new(now_ms: u64, jitter: u16, with_heartbeat: bool) -> Deadlines {
        let heartbeat = Some(Heartbeat { heard_ms: now_ms, asked_ms: None, not_before_ms: 0 });
        Deadlines {
            accepted_ms: now_ms,
            progress_ms: now_ms,
            turned_ms: now_ms,
            message_ms: NEVER,
            message_bytes: 0,
            output_ms: NEVER,
            output_bytes: 0,
            last_stage: None,
            last_stage_ms: NEVER,
            rare: with_heartbeat.then(|| Box::new(Rare { heartbeat, ..Rare::default() })),
            jitter,
            unawaited_ms: 0,
            waited_ms: 0,
            opened: Opened::ByRead,
            first_byte_seen: false,
            half_closed: false,
            ignores_bytes: false,
        }
    }

    /// Sets one of the limits for this connection, from now on.
    pub(crate) fn set(&mut self, limits: &Limits, kind: DeadlineKind, limit_ms: u64) {
        let lifetime_ms = self.limit_ms(limits, DeadlineKind::Lifetime);
        let own = self.rare.get_or_insert_default().own.get_or_insert_with(|| {
            let mut own = Box::new(limits.kinds_ms);
            own[DeadlineKind::Lifetime as usize] = lifetime_ms;
            own
        });
        own[kind as usize] = limit_ms;
    }

    /// A limit as it is for this connection.
    pub(crate) fn limit_ms(&self, limits: &Limits, kind: DeadlineKind) -> u64 {
        match self.rare.as_ref().and_then(|rare| rare.own.as_ref()) {
            Some(own) => own[kind as usize],
            None if kind == DeadlineKind::Lifetime => {
                let longest_ms = limits.kinds_ms[kind as usize];
                longest_ms - longest_ms / 10 * u64::from(self.jitter) / u64::from(u16::MAX)
            }
            None => limits.kinds_ms[kind as usize],
        }
    }

    pub(crate) fn received(&mut self, now_ms: u64) {
        self.first_byte_seen = true;
        self.progress_ms = now_ms;
        if let Some(heartbeat) = self.heartbeat() {
            (heartbeat.heard_ms, heartbeat.asked_ms) = (now_ms, None);
        }
    }

    /// The kernel took some output.
    pub(crate) fn sent(&mut self, now_ms: u64) {
        self.progress_ms = now_ms;
    }

    /// A message begins, when so many bytes had been received. None does within another, but what a
    /// read has opened may turn out to be a part of the protocol layer's message.
    pub(crate) fn begin_message(&mut self, now_ms: u64, opened: Opened, bytes: u64) {
        if !self.is_in_message() {
            (self.message_ms, self.message_bytes, self.opened) = (now_ms, bytes, opened);
            self.unawaited_ms = 0;
        } else if opened == Opened::ByLayer {
            self.opened = opened;
        }
    }

    /// It ends. A read ends none that the protocol layer has begun; the layer's word is the last,
    /// as for one that a read has left open which was given up.
    pub(crate) fn end_message(&mut self, by: Opened) {
        if self.opened == by || by == Opened::ByLayer {
            self.message_ms = NEVER;
            self.shed(|rare| rare.input = None);
        }
    }

    pub(crate) fn is_in_message(&self) -> bool {
        self.message_ms != NEVER
    }

    /// Output is queued, behind `bytes` in the connection's life. True when none was on its way,
    /// as far as is known, which is news to the wheel.
    pub(crate) fn output_began(&mut self, now_ms: u64, bytes: u64) -> bool {
        let begins = !self.has_output();
        if begins {
            (self.output_ms, self.output_bytes) = (now_ms, bytes);
        }
        begins
    }

    /// Whether there may be output that the peer has not taken.
    pub(crate) fn has_output(&self) -> bool {
        self.output_ms != NEVER
    }

    /// For how long the peer has taken none of the output, as far as that was looked at.
    pub(crate) fn output_stuck_ms(&self, now_ms: u64) -> u64 {
        if self.has_output() { now_ms.saturating_sub(self.output_ms) } else { 0 }
    }

    /// The output was looked at: of `total` bytes in the connection's life, the peer has taken
    /// `acknowledged`. No rate is asked for where that number is not exact.
    pub(crate) fn looked_at_output(
        &mut self,
        limits: &Limits,
        now_ms: u64,
        acknowledged: u64,
        total: u64,
        exact: bool,
    ) -> Verdict {
        if acknowledged >= total {
            self.output_ms = NEVER;
            self.shed(|rare| rare.output = None);
            return Verdict::Fine;
        }
        let write_stall_ms = self.limit_ms(limits, DeadlineKind::WriteStall);
        let rate = limits.rate;
        let rare = self.rare.get_or_insert_default();
        let Some(backlog) = &mut rare.output else {
            // It may have taken some since this began; nobody has looked.
            let began_ms = std::mem::replace(&mut self.output_ms, now_ms);
            let mut pace = Pace::new(began_ms, self.output_bytes, rate);
            pace.look(now_ms, acknowledged, rate, rate.grace_ms.saturating_add(write_stall_ms));
            rare.output = Some(Backlog { acknowledged, goal: total, pace });
            return Verdict::Fine;
        };
        let moved = backlog.acknowledged != acknowledged;
        backlog.acknowledged = acknowledged;
        // The little that is left, and what was not there at the last look, is nobody's fault.
        let late = acknowledged < backlog.goal && total - acknowledged > rate.grace_bytes();
        let too_slow = if late && exact && rate.is_on() {
            let ahead_ms_max = rate.grace_ms.saturating_add(write_stall_ms);
            backlog.pace.look(now_ms, acknowledged, rate, ahead_ms_max)
        } else {
            backlog.goal = total;
            backlog.pace.forgive(now_ms, acknowledged, rate);
            false
        };
        if moved {
            (self.progress_ms, self.output_ms) = (now_ms, now_ms);
        }
        if now_ms.saturating_sub(self.output_ms) >= write_stall_ms {
            Verdict::Stalled
        } else if too_slow {
            Verdict::TooSlow
        } else {
            Verdict::Fine
        }
    }

    /// The message that is being received was looked at, when `bytes` had been received. True when
    /// it comes too slowly. Time in which nobody waited for the peer does not count.
    pub(crate) fn looked_at_input(
        &mut self,
        limits: &Limits,
        moment: Moment,
        hears: bool,
        bytes: u64,
    ) -> bool {
        if !self.is_in_message() {
            return false;
        }
        let (since_ms, began_bytes) = (self.message_ms, self.message_bytes);
        let unawaited_ms = std::mem::take(&mut self.unawaited_ms);
        let rare = self.rare.get_or_insert_default();
        let begin = || Pace::new(since_ms, began_bytes, limits.rate);
        let pace = rare.input.get_or_insert_with(begin);
        if !moment.waits || !hears {
            pace.forgive(moment.now_ms, bytes, limits.rate);
            return false;
        }
        pace.skip(unawaited_ms.into());
        pace.skip_to(moment.resumed_ms);
        // The message's own deadline says how long it may take, whatever was ahead.
        pace.look(moment.now_ms, bytes, limits.rate, u64::MAX)
    }

    /// The peer is asked for a sign of life.
    pub(crate) fn asked(&mut self, now_ms: u64) {
        if let Some(heartbeat) = self.heartbeat() {
            heartbeat.asked_ms = Some(now_ms);
        }
    }

    /// It can't be asked or judged now, so it is not before a part of the period has passed.
    pub(crate) fn postpone_heartbeat(&mut self, limits: &Limits, now_ms: u64) {
        if let Some(heartbeat) = self.heartbeat() {
            heartbeat.not_before_ms = now_ms + (limits.heartbeat_ms / 8).max(1);
        }
    }

    /// The lifetime is over: there is a moment to finish in.
    pub(crate) fn retire(&mut self, limits: &Limits, now_ms: u64) {
        let until_ms = now_ms.saturating_add(limits.retired_ms);
        self.rare.get_or_insert_default().retired_until_ms.get_or_insert(until_ms);
        self.turned_ms = now_ms;
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired_until_ms().is_some()
    }

    fn retired_until_ms(&self) -> Option<u64> {
        self.rare.as_ref()?.retired_until_ms
    }

    /// Whether it may have to be asked for signs of life.
    pub(crate) fn has_heartbeat(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| rare.heartbeat.is_some())
    }

    fn heartbeat(&mut self) -> Option<&mut Heartbeat> {
        self.rare.as_mut()?.heartbeat.as_mut()
    }

    /// Gives something rare up, and the memory with it if that was all.
    fn shed(&mut self, give_up: impl FnOnce(&mut Rare)) {
        if let Some(rare) = &mut self.rare {
            give_up(rare);
            if **rare == Rare::default() {
                self.rare = None;
            }
        }
    }

    /// From now on only this deadline counts.
    pub(crate) fn enter_last_stage(&mut self, stage: Expired, until_ms: u64) {
        (self.last_stage, self.last_stage_ms) = (Some(stage), until_ms);
    }

    /// None is waited for any more.
    pub(crate) fn excuse_first_byte(&mut self) {
        self.first_byte_seen = true;
    }

    pub(crate) fn has_first_byte(&self) -> bool {
        self.first_byte_seen
    }

    pub(crate) fn accepted_ms(&self) -> u64 {
        self.accepted_ms
    }

    /// The last byte in either direction, or the accept.
    pub(crate) fn progress_ms(&self) -> u64 {
        self.progress_ms
    }

    /// When a deadline passes if nothing more happens; `None` while it does not run.
    pub(crate) fn at_ms(&self, limits: &Limits, kind: DeadlineKind, waits: bool) -> Option<u64> {
        let turned_ms = self.progress_ms.max(self.turned_ms);
        let since_ms = match kind {
            DeadlineKind::FirstByte => (!self.first_byte_seen).then_some(self.accepted_ms),
            DeadlineKind::Message => self.is_in_message().then_some(self.message_ms),
            DeadlineKind::Idle if self.ignores_bytes => waits.then_some(self.turned_ms),
            DeadlineKind::Idle => waits.then_some(turned_ms),
            DeadlineKind::Handler => (!waits).then_some(turned_ms),
            DeadlineKind::WriteStall => self.has_output().then_some(self.output_ms),
            DeadlineKind::HalfClose => (self.half_closed && !waits).then_some(turned_ms),
            DeadlineKind::Lifetime => return Some(self.lifetime_end_ms(limits)),
        };
        since_ms.map(|since_ms| since_ms.saturating_add(self.limit_ms(limits, kind)))
    }

    /// The deadline that passes first if nothing more happens; in a last stage, when that is over.
    pub(crate) fn first(&self, limits: &Limits, waits: bool) -> (u64, Option<DeadlineKind>) {
        if self.last_stage.is_some() {
            return (self.last_stage_ms, None);
        }
        let lifetime = (self.lifetime_end_ms(limits), DeadlineKind::Lifetime);
        let first = self.running(limits, waits).min_by_key(|(at_ms, _)| *at_ms);
        let (at_ms, kind) = first.unwrap_or(lifetime);
        (at_ms, Some(kind))
    }

    /// Every deadline that runs, and when it passes; none in a last stage.
    pub(crate) fn running(
        &self,
        limits: &Limits,
        waits: bool,
    ) -> impl Iterator<Item = (u64, DeadlineKind)> {
        let kinds = DeadlineKind::ALL.into_iter().filter(|_| self.last_stage.is_none());
        kinds.filter_map(move |kind| Some((self.at_ms(limits, kind, waits)?, kind)))
    }

    /// When the connection reaches its greatest age, or has to be gone after that.
    pub(crate) fn lifetime_end_ms(&self, limits: &Limits) -> u64 {
        let end_ms = self.limit_ms(limits, DeadlineKind::Lifetime);
        self.retired_until_ms().unwrap_or_else(|| self.accepted_ms.saturating_add(end_ms))
    }

    /// The earliest moment at which something may have to be done, and what. There always is one.
    pub(crate) fn next(&self, limits: &Limits, moment: Moment) -> Next {
        if let Some(expired) = self.last_stage {
            let at_ms = self.last_stage_ms;
            return Next { at_ms, latest_ms: at_ms, expired };
        }
        let expired = match self.retired_until_ms() {
            None => Expired::Kind(DeadlineKind::Lifetime),
            Some(_) => Expired::Retired,
        };
        let mut next = Next::new(self.lifetime_end_ms(limits), limits.retired_ms, expired);
        for kind in KINDS_THAT_END {
            if let Some(at_ms) = self.at_ms(limits, kind, moment.waits) {
                next.consider(at_ms, self.limit_ms(limits, kind), Expired::Kind(kind));
            }
        }
        // The other one of the two may begin any moment.
        let other = if moment.waits { DeadlineKind::Handler } else { DeadlineKind::Idle };
        let other_ms = self.limit_ms(limits, other);
        next.consider(moment.now_ms.saturating_add(other_ms), other_ms, Expired::Kind(other));
        self.consider_output(limits, &mut next);
        self.consider_input(limits, &mut next);
        self.consider_heartbeat(limits, moment.resumed_ms, &mut next);
        next
    }

    fn consider_output(&self, limits: &Limits, next: &mut Next) {
        if self.has_output() {
            let (at_ms, step_ms) = self.next_look(limits, self.output_ms);
            next.consider(at_ms, step_ms, Expired::Output);
        }
    }

    /// When output that begins now has to be looked at.
    pub(crate) fn first_look(&self, limits: &Limits, now_ms: u64) -> Next {
        let (at_ms, step_ms) = self.next_look(limits, now_ms);
        Next::new(at_ms, step_ms, Expired::Output)
    }

    /// When to look at the output next that began then, and how long that is after the last look.
    fn next_look(&self, limits: &Limits, began_ms: u64) -> (u64, u64) {
        let behind = self.rare.as_ref().and_then(|rare| rare.output);
        let rate = limits.rate;
        let mut step_ms = (self.limit_ms(limits, DeadlineKind::WriteStall) / LOOKS).max(1);
        if rate.is_on() {
            let of_rate_ms = if behind.is_some() { rate.step_ms() } else { rate.grace_ms };
            step_ms = step_ms.min(of_rate_ms);
        }
        let looked_ms = behind.map_or(began_ms, |backlog| backlog.pace.looked_ms());
        (looked_ms.saturating_add(step_ms), step_ms)
    }

    fn consider_input(&self, limits: &Limits, next: &mut Next) {
        let rate = limits.rate;
        let looked = self.rare.as_ref().and_then(|rare| rare.input);
        let (since_ms, step_ms) = match looked {
            Some(pace) => (pace.looked_ms(), rate.step_ms()),
            None => (self.message_ms, rate.grace_ms),
        };
        if self.is_in_message() && rate.is_on() {
            next.consider(since_ms.saturating_add(step_ms), step_ms, Expired::Input);
        }
    }

    fn consider_heartbeat(&self, limits: &Limits, resumed_ms: u64, next: &mut Next) {
        let Some(heartbeat) = self.rare.as_ref().and_then(|rare| rare.heartbeat) else { return };
        if !self.first_byte_seen || self.half_closed || limits.heartbeat_ms == 0 {
            return;
        }
        let (period_ms, timeout_ms) = (limits.heartbeat_ms, limits.heartbeat_timeout_ms);
        let spread_ms = period_ms / 5 * u64::from(self.jitter) / u64::from(u16::MAX);
        let again_ms = period_ms - period_ms / 10 + spread_ms;
        // Whoever was asked before a pause of ours may have answered in it.
        let heard_ms = heartbeat.heard_ms.max(resumed_ms);
        let (since_ms, step_ms, expired) = match heartbeat.asked_ms {
            None => (heard_ms, again_ms, Expired::Beat),
            Some(asked_ms) if resumed_ms >= asked_ms => (heard_ms, again_ms, Expired::Heartbeat),
            Some(asked_ms) => (asked_ms, timeout_ms, Expired::Heartbeat),
        };
        let at_ms = since_ms.saturating_add(step_ms).max(heartbeat.not_before_ms);
        next.consider(at_ms, step_ms, expired);
    }
}

/// Those whose passing ends the connection by itself. A write stall is found by looking, and the
/// lifetime's end is the beginning of a retirement.
const KINDS_THAT_END: [DeadlineKind; 5] = [
    DeadlineKind::FirstByte,
    DeadlineKind::Message,
    DeadlineKind::Idle,
    DeadlineKind::Handler,
    DeadlineKind::HalfClose,
];

const NEVER: u64 = u64::MAX;

const _: () = assert!(size_of::<Deadlines>() <= 88);

/// How often a write stall's time is divided by looks; it ends at most two of them late.
const LOOKS: u64 = 8;

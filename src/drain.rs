//! The phases of a drain: a pure state machine that is told the time and what is left.
//!
//! ```text
//! Running -> LameDuck -> StopAccept -> DrainConnections -> Force -> Down
//! ```
//! Phases only move forward, and each is left as soon as nothing keeps it: a drain of an empty
//! server passes through all of them in one turn. Only the deadline can be changed on the way,
//! and only to an earlier one.

/// Where a core stands in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Serving.
    #[default]
    Running,
    /// Still accepting, but no longer ready in the eyes of a load balancer.
    LameDuck,
    /// Taking what is queued at the listeners, then closing them.
    StopAccept,
    /// Idle connections are closed, active ones finish. A core that others may call, as it has
    /// state or has been called before, stays until theirs have finished too.
    DrainConnections,
    /// Time is up: what is left is told so, then dropped.
    Force,
    /// Nothing is left; the ring goes.
    Down,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; PHASES] = [
        Phase::Running,
        Phase::LameDuck,
        Phase::StopAccept,
        Phase::DrainConnections,
        Phase::Force,
        Phase::Down,
    ];

    /// The name as it stands in JSON and metrics: lower case, words joined by `_`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Running => "running",
            Phase::LameDuck => "lame_duck",
            Phase::StopAccept => "stop_accept",
            Phase::DrainConnections => "drain_connections",
            Phase::Force => "force",
            Phase::Down => "down",
        }
    }

    /// The phase with this number.
    pub(crate) fn of(number: u64) -> Phase {
        Phase::ALL.into_iter().find(|phase| *phase as u64 == number).unwrap_or(Phase::Down)
    }
}

/// What is still there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Listeners whose queues are being emptied.
    pub(crate) listeners: usize,
    /// Those that wait for descriptors, which the end of connections may bring.
    pub(crate) starved: usize,
    pub(crate) connections: usize,
    pub(crate) tasks: usize,
    /// Others of the server that may still call this core, which has something to answer them.
    pub(crate) callers: bool,
}

impl Left {
    /// Whether this core itself has nothing to wait for.
    pub(crate) fn is_quiet(&self) -> bool {
        self.listeners + self.starved + self.connections + self.tasks == 0
    }
}

/// How a drain is to go; the times are those of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) lameduck_ns: u64,
    pub(crate) force_grace_ns: u64,
    pub(crate) close_spread_ns: u64,
    pub(crate) idle_min_keep_ns: u64,
}

/// One core's drain.
#[derive(Clone, Debug)]
pub(crate) struct Drain {
    plan: Plan,
    phase: Phase,
    begun_ns: u64,
    deadline_ns: u64,
    /// How long it takes to end all connections that there are.
    crowd_ns: u64,
    /// Until then connections are still accepted though no new ones are wanted.
    hold_until_ns: Option<u64>,
    /// When each phase was entered, in the order of [`Phase`].
    entered_ns: [u64; PHASES],
}

impl Drain {
    pub(crate) fn new(plan: Plan) -> Drain {
        Drain {
            plan,
            phase: Phase::Running,
            begun_ns: 0,
            deadline_ns: u64::MAX,
            crowd_ns: 0,
            hold_until_ns: None,
            entered_ns: [0; PHASES],
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    #[cfg(feature = "tracing")]
    pub(crate) fn has_entered(&self, phase: Phase) -> bool {
        self.entered_ns[phase as usize] != 0
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.phase >= Phase::StopAccept
    }

    /// Whether listeners go on accepting: they do until new handshakes are held off.
    pub(crate) fn accepts(&self) -> bool {
        self.phase < Phase::StopAccept || self.hold_until_ns.is_some()
    }

    pub(crate) fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// Begins the drain, or shortens the one that runs; a later deadline is ignored.
    pub(crate) fn order(&mut self, now_ns: u64, deadline_ns: u64) {
        if self.phase == Phase::Running {
            self.begun_ns = now_ns;
            self.enter(Phase::LameDuck, now_ns);
        }
        self.deadline_ns = self.deadline_ns.min(deadline_ns);
    }

    /// There are so many connections to be ended in time.
    pub(crate) fn expect(&mut self, connections: usize) {
        self.crowd_ns = (connections as u64).saturating_mul(END_NS);
    }

    /// One core of a server that goes on leaves: there is nobody to be told that it is a lame duck.
    pub(crate) fn retire(&mut self, now_ns: u64, deadline_ns: u64) {
        if self.phase == Phase::Running {
            self.plan.lameduck_ns = 0;
        }
        self.order(now_ns, deadline_ns);
    }

    /// Goes on accepting for so long, or until time is up.
    pub(crate) fn hold(&mut self, now_ns: u64, hold_ns: u64) {
        self.hold_until_ns = Some(now_ns.saturating_add(hold_ns));
    }

    /// Ends the hold if it is time; true once.
    pub(crate) fn end_hold(&mut self, now_ns: u64) -> bool {
        let over = self.hold_end_ns().is_some_and(|end_ns| now_ns >= end_ns);
        if over {
            self.hold_until_ns = None;
        }
        over
    }

    fn hold_end_ns(&self) -> Option<u64> {
        self.hold_until_ns.map(|until_ns| until_ns.min(self.force_ns()))
    }

    /// Enters the next phase if it is time, and says which. Call it until it says `None`.
    pub(crate) fn advance(&mut self, now_ns: u64, left: Left) -> Option<Phase> {
        let next = self.due(now_ns, left)?;
        self.enter(next, now_ns);
        Some(next)
    }

    /// Whether time is up, so that nothing may be waited for any more.
    pub(crate) fn is_late(&self, now_ns: u64) -> bool {
        self.is_draining() && now_ns >= self.force_ns()
    }

    /// Whether it went down as nothing was left to wait for, before its deadline.
    pub(crate) fn is_complete(&self) -> bool {
        self.phase == Phase::Down && self.entered_ns[Phase::Force as usize] == 0
    }

    /// The phase that it is time to enter.
    pub(crate) fn due(&self, now_ns: u64, left: Left) -> Option<Phase> {
        let forced = now_ns >= self.force_ns();
        let quiet = left.is_quiet();
        match self.phase {
            Phase::LameDuck if forced || now_ns >= self.lameduck_end_ns() => {
                Some(Phase::StopAccept)
            }
            // The listeners are closed first even when time is up: it takes no waiting, and what
            // is in their queues would be reset otherwise.
            Phase::StopAccept if left.listeners == 0 && self.hold_until_ns.is_none() => {
                Some(Phase::DrainConnections)
            }
            Phase::DrainConnections if quiet && (!left.callers || forced) => Some(Phase::Down),
            Phase::DrainConnections if forced => Some(Phase::Force),
            Phase::Force if quiet || now_ns >= self.deadline_ns => Some(Phase::Down),
            _ => None,
        }
    }

    /// Whether somebody has ordered it.
    pub(crate) fn is_ordered(&self) -> bool {
        self.phase != Phase::Running
    }

    /// When to look again though nothing has happened.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        match self.phase {
            Phase::Running | Phase::Down => None,
            // After the hold listeners are closed when the kernel has answered, not at a time.
            Phase::StopAccept => self.hold_end_ns(),
            Phase::LameDuck => Some(self.lameduck_end_ns().min(self.force_ns())),
            Phase::DrainConnections => Some(self.force_ns()),
            Phase::Force => Some(self.deadline_ns),
        }
    }

    /// When a connection that is idle since `progress_ns` is to be closed; `lot` is its place in
    /// the spread, from 0 to `u32::MAX`. Never so late that it would have to be forced.
    pub(crate) fn farewell_ns(&self, progress_ns: u64, lot: u32) -> u64 {
        let begun_ns = self.entered_ns[Phase::StopAccept as usize];
        let time_ns = self.force_ns().saturating_sub(begun_ns) / 8 * 7;
        let spread_ns = u128::from(self.plan.close_spread_ns.min(time_ns));
        let at_ns = begun_ns.saturating_add(((spread_ns * u128::from(lot)) >> 32) as u64);
        let kept_ns = match self.plan.idle_min_keep_ns {
            0 => 0,
            keep_ns => progress_ns.saturating_add(keep_ns),
        };
        at_ns.max(kept_ns).min(begun_ns.saturating_add(time_ns))
    }

    /// How long each phase took, up to `now_ns`, in the order of [`Phase`] from LameDuck to Force.
    pub(crate) fn durations_ns(&self, now_ns: u64) -> [u64; PHASES] {
        let mut durations = [0; PHASES];
        let mut end_ns = now_ns;
        for phase in (1..PHASES).rev() {
            if self.entered_ns[phase] != 0 {
                durations[phase] = end_ns.saturating_sub(self.entered_ns[phase]);
                end_ns = self.entered_ns[phase];
            }
        }
        durations
    }

    fn enter(&mut self, phase: Phase, now_ns: u64) {
        debug_assert!(phase > self.phase);
        self.phase = phase;
        // Zero stands for "never entered".
        self.entered_ns[phase as usize] = now_ns.max(1);
    }

    fn lameduck_end_ns(&self) -> u64 {
        self.begun_ns.saturating_add(self.plan.lameduck_ns)
    }

    /// The grace lies before the deadline, and takes at most a tenth of the whole; so does the time
    /// that it takes to end a crowd.
    fn force_ns(&self) -> u64 {
        let tenth_ns = self.deadline_ns.saturating_sub(self.begun_ns) / 10;
        let lead_ns = self.plan.force_grace_ns.min(tenth_ns) + self.crowd_ns.min(tenth_ns);
        self.deadline_ns.saturating_sub(lead_ns)
    }
}

/// What it takes to end a connection, with some to spare: most of it is the kernel's FIN.
const END_NS: u64 = 25_000;

pub(crate) const PHASES: usize = Phase::Down as usize + 1;

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan =
        Plan { lameduck_ns: 0, force_grace_ns: 100, close_spread_ns: 0, idle_min_keep_ns: 0 };
    const BUSY: Left = Left { listeners: 0, starved: 0, connections: 1, tasks: 1, callers: false };
    const EMPTY: Left = Left { listeners: 0, starved: 0, connections: 0, tasks: 0, callers: false };

    fn phases(drain: &mut Drain, now_ns: u64, left: Left) -> Vec<Phase> {
        std::iter::from_fn(|| drain.advance(now_ns, left)).collect()
    }

    #[test]
    fn an_empty_server_is_down_in_one_turn() {
        let mut drain = Drain::new(PLAN);
        drain.order(5, 1_000_000);
        let passed = phases(&mut drain, 5, EMPTY);
        assert_eq!(passed, [Phase::StopAccept, Phase::DrainConnections, Phase::Down]);
    }

    #[test]
    fn a_crowd_is_forced_earlier_by_what_it_takes_to_end_it_and_a_tenth_at_most() {
        for (connections, force_ns) in [(0, 9_900_000), (4, 9_800_000), (1_000_000, 8_900_000)] {
            let mut drain = Drain::new(Plan { force_grace_ns: 100_000, ..PLAN });
            drain.expect(connections);
            drain.order(0, 10_000_000);
            phases(&mut drain, 0, BUSY);
            assert_eq!(drain.next_ns(), Some(force_ns), "{connections}");
        }
    }

    #[test]
    fn force_comes_a_grace_before_the_deadline_and_down_at_it() {
        let mut drain = Drain::new(PLAN);
        drain.order(0, 10_000);
        phases(&mut drain, 0, BUSY);
        assert_eq!(drain.phase(), Phase::DrainConnections);
        assert_eq!(drain.next_ns(), Some(9_900));
        assert_eq!(phases(&mut drain, 9_899, BUSY), []);
        assert_eq!(phases(&mut drain, 9_900, BUSY), [Phase::Force]);
        assert_eq!(phases(&mut drain, 9_999, BUSY), []);
        assert_eq!(phases(&mut drain, 10_000, BUSY), [Phase::Down]);
    }

    #[test]
    fn the_grace_takes_at_most_a_tenth() {
        let mut drain = Drain::new(PLAN);
        drain.order(0, 500);
        phases(&mut drain, 0, BUSY);
        assert_eq!(drain.next_ns(), Some(450));
    }

    #[test]
    fn a_second_order_only_shortens() {
        let mut drain = Drain::new(PLAN);
        drain.order(0, 10_000);
        drain.order(10, 20_000);
        assert_eq!(drain.deadline_ns(), 10_000);
        drain.order(20, 2_000);
        assert_eq!(drain.deadline_ns(), 2_000);
    }

    /// Scenario 17.
    #[test]
    fn a_deadline_in_the_past_goes_straight_through_without_overflow() {
        for deadline_ns in [0, 1, 50] {
            let mut drain = Drain::new(Plan {
                lameduck_ns: u64::MAX,
                force_grace_ns: u64::MAX,
                close_spread_ns: u64::MAX,
                idle_min_keep_ns: u64::MAX,
            });
            drain.order(50, deadline_ns);
            let passed = phases(&mut drain, 50, BUSY);
            for (progress_ns, lot) in [(0, 0), (u64::MAX, u32::MAX)] {
                assert_eq!(drain.farewell_ns(progress_ns, lot), 50, "at once");
            }
            let all = [Phase::StopAccept, Phase::DrainConnections, Phase::Force, Phase::Down];
            assert_eq!(passed, all);
        }
    }

    #[test]
    fn listeners_are_closed_before_anything_else_even_when_forced() {
        let mut drain = Drain::new(PLAN);
        drain.order(0, 0);
        let open = Left { listeners: 1, ..BUSY };
        assert_eq!(phases(&mut drain, 0, open), [Phase::StopAccept]);
        assert!(drain.is_draining());
        assert_eq!(phases(&mut drain, 0, BUSY).last(), Some(&Phase::Down));
    }

    #[test]
    fn closes_are_spread_evenly_and_never_so_late_that_force_comes_first() {
        let mut drain = Drain::new(Plan { close_spread_ns: 1_000, ..PLAN });
        drain.order(0, 100_000);
        phases(&mut drain, 10, BUSY);
        let quarters = [0, 1 << 30, 2 << 30, 3 << 30, u32::MAX];
        assert_eq!(quarters.map(|lot| drain.farewell_ns(0, lot)), [10, 260, 510, 760, 1_009]);
        // A shorter deadline squeezes the spread.
        drain.order(20, 910);
        assert_eq!(quarters.map(|lot| drain.farewell_ns(0, lot)), [10, 186, 363, 540, 716]);
    }

    #[test]
    fn an_idle_connection_is_kept_for_its_time_after_the_last_byte() {
        let mut drain = Drain::new(Plan { idle_min_keep_ns: 500, ..PLAN });
        drain.order(1_000, 100_000);
        phases(&mut drain, 1_000, BUSY);
        assert_eq!(drain.farewell_ns(400, 7), 1_000, "quiet for long enough");
        assert_eq!(drain.farewell_ns(900, 7), 1_400);
        // One that is never quiet is closed in time all the same.
        assert!(drain.farewell_ns(99_000, 7) < drain.next_ns().unwrap());
    }

    /// Those that wait for descriptors would wait for good if no connection were told to end.
    #[test]
    fn listeners_without_descriptors_hold_up_the_end_and_not_the_connections() {
        let mut drain = Drain::new(PLAN);
        drain.order(0, 10_000);
        let starved = Left { starved: 1, ..EMPTY };
        let passed = phases(&mut drain, 0, starved);
        assert_eq!(passed, [Phase::StopAccept, Phase::DrainConnections]);
        assert_eq!(phases(&mut drain, 1, Left { listeners: 1, ..EMPTY }), []);
        assert_eq!(phases(&mut drain, 2, EMPTY), [Phase::Down]);
    }

    #[test]
    fn accepting_goes_on_while_handshakes_are_held_off_but_not_beyond_the_deadline() {
        let open = Left { listeners: 1, ..BUSY };
        for (deadline_ns, end_ns) in [(10_000, 70), (60, 54), (0, 20)] {
            let mut drain = Drain::new(PLAN);
            drain.order(0, deadline_ns);
            assert_eq!(phases(&mut drain, 20, open), [Phase::StopAccept]);
            drain.hold(20, 50);
            assert!(drain.accepts() && drain.is_draining());
            assert_eq!(drain.next_ns(), Some(end_ns.min(deadline_ns)));
            assert!(end_ns == 20 || !drain.end_hold(end_ns - 1));
            assert!(drain.end_hold(end_ns) && !drain.end_hold(end_ns) && !drain.accepts());
            assert_eq!(drain.next_ns(), None);
        }
    }

    #[test]
    fn a_server_without_listeners_holds_nobody_off() {
        let mut drain = Drain::new(PLAN);
        drain.order(5, 1_000_000);
        assert_eq!(drain.advance(5, EMPTY), Some(Phase::StopAccept));
        drain.hold(5, 0);
        assert!(drain.end_hold(5));
        assert_eq!(phases(&mut drain, 5, EMPTY), [Phase::DrainConnections, Phase::Down]);
    }

    #[test]
    fn a_core_that_leaves_alone_is_no_lame_duck() {
        let mut drain = Drain::new(Plan { lameduck_ns: 5_000, ..PLAN });
        drain.retire(0, 10_000);
        assert_eq!(drain.advance(0, BUSY), Some(Phase::StopAccept));
        assert_eq!(drain.deadline_ns(), 10_000);
        // One that is a lame duck already stays one: the whole server has been told to go.
        let mut drain = Drain::new(Plan { lameduck_ns: 5_000, ..PLAN });
        drain.order(0, 20_000);
        drain.retire(0, 10_000);
        assert_eq!(drain.advance(0, BUSY), None);
    }

    #[test]
    fn durations_add_up_to_the_whole() {
        let mut drain = Drain::new(Plan { lameduck_ns: 300, ..PLAN });
        drain.order(100, 10_000);
        phases(&mut drain, 400, BUSY);
        phases(&mut drain, 9_900, BUSY);
        phases(&mut drain, 10_000, BUSY);
        let durations = drain.durations_ns(10_050);
        assert_eq!(durations, [0, 300, 0, 9_500, 100, 50]);
        assert_eq!(durations.iter().sum::<u64>(), 10_050 - 100);
    }
}

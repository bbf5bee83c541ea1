//! The phases of a drain: a pure state machine that is told the time and what is left.
//!
//! ```text
//! Running -> LameDuck -> StopAccept -> DrainConnections -> Force -> Down
//! ```
//! Phases only move forward, and each is left as soon as nothing keeps it: a drain of an empty
//! server passes through all of them in one turn. Only the deadline can be changed on the way,
//! and only to an earlier one.

/// Where a core stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Serving.
    Running,
    /// Still accepting, but no longer ready in the eyes of a load balancer.
    LameDuck,
    /// Taking what is queued at the listeners, then closing them.
    StopAccept,
    /// Idle connections are closed, active ones finish.
    DrainConnections,
    /// Time is up: what is left is told so, then dropped.
    Force,
    /// Nothing is left; the ring goes.
    Down,
}

/// What is still there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) listeners: usize,
    pub(crate) connections: usize,
    pub(crate) tasks: usize,
}

/// How a drain is to go; the times are those of the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) lameduck_ns: u64,
    pub(crate) force_grace_ns: u64,
}

/// One core's drain.
#[derive(Clone, Debug)]
pub(crate) struct Drain {
    plan: Plan,
    phase: Phase,
    begun_ns: u64,
    deadline_ns: u64,
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
            entered_ns: [0; PHASES],
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.phase >= Phase::StopAccept
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

    /// Enters the next phase if it is time, and says which. Call it until it says `None`.
    pub(crate) fn advance(&mut self, now_ns: u64, left: Left) -> Option<Phase> {
        let next = self.due(now_ns, left)?;
        self.enter(next, now_ns);
        Some(next)
    }

    /// The phase that it is time to enter.
    pub(crate) fn due(&self, now_ns: u64, left: Left) -> Option<Phase> {
        let forced = now_ns >= self.force_ns();
        let quiet = left.connections == 0 && left.tasks == 0;
        match self.phase {
            Phase::LameDuck if forced || now_ns >= self.lameduck_end_ns() => {
                Some(Phase::StopAccept)
            }
            // The listeners are closed first even when time is up: it takes no waiting, and what
            // is in their queues would be reset otherwise.
            Phase::StopAccept if left.listeners == 0 => Some(Phase::DrainConnections),
            Phase::DrainConnections if quiet => Some(Phase::Down),
            Phase::DrainConnections if forced => Some(Phase::Force),
            Phase::Force if quiet || now_ns >= self.deadline_ns => Some(Phase::Down),
            _ => None,
        }
    }

    /// When to look again though nothing has happened.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        match self.phase {
            // Listeners are closed when the kernel has answered, not at a time.
            Phase::Running | Phase::StopAccept | Phase::Down => None,
            Phase::LameDuck => Some(self.lameduck_end_ns().min(self.force_ns())),
            Phase::DrainConnections => Some(self.force_ns()),
            Phase::Force => Some(self.deadline_ns),
        }
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

    /// The grace lies before the deadline, and takes at most a tenth of the whole.
    fn force_ns(&self) -> u64 {
        let whole_ns = self.deadline_ns.saturating_sub(self.begun_ns);
        self.deadline_ns.saturating_sub(self.plan.force_grace_ns.min(whole_ns / 10))
    }
}

pub(crate) const PHASES: usize = Phase::Down as usize + 1;

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { lameduck_ns: 0, force_grace_ns: 100 };
    const BUSY: Left = Left { listeners: 0, connections: 1, tasks: 1 };
    const EMPTY: Left = Left { listeners: 0, connections: 0, tasks: 0 };

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

    #[test]
    fn a_deadline_in_the_past_goes_straight_through_without_overflow() {
        for deadline_ns in [0, 1, 50] {
            let mut drain = Drain::new(Plan { lameduck_ns: u64::MAX, force_grace_ns: u64::MAX });
            drain.order(50, deadline_ns);
            let passed = phases(&mut drain, 50, BUSY);
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
    fn durations_add_up_to_the_whole() {
        let mut drain = Drain::new(Plan { lameduck_ns: 300, force_grace_ns: 100 });
        drain.order(100, 10_000);
        phases(&mut drain, 400, BUSY);
        phases(&mut drain, 9_900, BUSY);
        phases(&mut drain, 10_000, BUSY);
        let durations = drain.durations_ns(10_050);
        assert_eq!(durations, [0, 300, 0, 9_500, 100, 50]);
        assert_eq!(durations.iter().sum::<u64>(), 10_050 - 100);
    }
}

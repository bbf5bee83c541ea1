//! The deadlines against an account of their own: seeds of random lives, one millisecond at a time.

use std::cell::RefCell;

use super::*;
use crate::pace::Rate;
use crate::sim::{Rng, for_seeds};

fn limits() -> Limits {
    // In the order of `DeadlineKind::ALL`.
    let kinds_ms = [10, 40, 75, 60, 30, 50, 1000];
    let rate = Rate { bytes_per_s: 0, grace_ms: 5 };
    Limits { kinds_ms, retired_ms: 25, rate, heartbeat_ms: 0, heartbeat_timeout_ms: 5 }
}

fn next(deadlines: &Deadlines, now_ms: u64, waits: bool) -> (u64, Expired) {
    let next = deadlines.next(&limits(), Moment { now_ms, waits, resumed_ms: 0 });
    (next.at_ms, next.expired)
}

#[test]
fn the_first_byte_is_due_until_it_comes() {
    let mut deadlines = Deadlines::new(100, 0, false);
    assert_eq!(next(&deadlines, 100, true), (110, Expired::Kind(DeadlineKind::FirstByte)));
    deadlines.received(105);
    assert_eq!(next(&deadlines, 110, false), (165, Expired::Kind(DeadlineKind::Handler)));
    deadlines.waits(115);
    assert_eq!(next(&deadlines, 165, true), (190, Expired::Kind(DeadlineKind::Idle)));
}

#[test]
fn a_message_is_due_from_its_first_byte_whatever_comes_of_it() {
    let mut deadlines = Deadlines::new(0, 0, false);
    deadlines.received(5);
    deadlines.begin_message(5, Opened::ByLayer, 0);
    for now_ms in 6..45 {
        deadlines.received(now_ms);
        deadlines.begin_message(now_ms, Opened::ByRead, 0);
        deadlines.end_message(Opened::ByRead);
        assert_eq!(next(&deadlines, now_ms, true), (45, Expired::Kind(DeadlineKind::Message)));
    }
    deadlines.end_message(Opened::ByLayer);
    // A read had to wait for what turns out to be the layer's.
    deadlines.begin_message(70, Opened::ByRead, 0);
    deadlines.begin_message(80, Opened::ByLayer, 0);
    deadlines.end_message(Opened::ByRead);
    assert_eq!(deadlines.at_ms(&limits(), DeadlineKind::Message, true), Some(110));
    deadlines.end_message(Opened::ByLayer);
    assert_ne!(next(&deadlines, 44, true).0, 45);
}

#[cfg(feature = "hyper")]
#[test]
fn a_message_that_is_put_aside_goes_on_where_it_stood() {
    let mut deadlines = Deadlines::new(0, 0, false);
    deadlines.received(5);
    deadlines.begin_message(5, Opened::ByLayer, 3);
    let (ms, bytes) = deadlines.message(20).expect("it has begun");
    assert_eq!((ms, bytes), (15, 3));
    deadlines.end_message(Opened::ByLayer);
    assert_eq!(deadlines.message(30), None);
    deadlines.begin_message(100 - ms, Opened::ByLayer, bytes);
    assert_eq!(deadlines.at_ms(&limits(), DeadlineKind::Message, true), Some(125));
}

#[cfg(feature = "hyper")]
#[test]
fn pings_keep_nobody_from_being_idle() {
    let mut deadlines = Deadlines::new(0, 0, false);
    deadlines.ignores_bytes_when_idle();
    deadlines.received(5);
    deadlines.told(10);
    for now_ms in 11..85 {
        deadlines.received(now_ms);
        deadlines.sent(now_ms);
        deadlines.waits(now_ms);
        assert_eq!(next(&deadlines, now_ms, true).0, 85.min(now_ms + 60));
        assert_eq!(deadlines.at_ms(&limits(), DeadlineKind::Handler, false), Some(now_ms + 60));
    }
    assert_eq!(next(&deadlines, 85, true), (85, Expired::Kind(DeadlineKind::Idle)));
}

#[test]
fn a_stall_counts_from_the_last_progress_of_the_output_alone() {
    let mut deadlines = Deadlines::new(0, 0, false);
    deadlines.received(1);
    deadlines.output_began(10, 0);
    deadlines.output_began(12, 0);
    let look = |deadlines: &mut Deadlines, acknowledged| {
        let (at_ms, expired) = next(deadlines, 0, true);
        assert_eq!(expired, Expired::Output);
        (at_ms, deadlines.looked_at_output(&limits(), at_ms, acknowledged, 100, true))
    };
    assert_eq!(look(&mut deadlines, 0), (13, Verdict::Fine));
    assert_eq!(look(&mut deadlines, 50), (16, Verdict::Fine));
    // What is received has nothing to do with it.
    deadlines.received(20);
    let mut end_ms = 0;
    for _ in 0..20 {
        let (at_ms, verdict) = look(&mut deadlines, 50);
        assert!(at_ms > end_ms);
        end_ms = at_ms;
        if verdict == Verdict::Stalled {
            break;
        }
    }
    assert_eq!(end_ms, 46, "30 ms after the last progress");
    deadlines.looked_at_output(&limits(), 50, 100, 100, true);
    assert!(!deadlines.has_output(), "the peer has all");
}

#[test]
fn a_peer_is_slow_when_it_stays_behind_and_not_when_it_catches_up() {
    let limits = Limits { rate: Rate { bytes_per_s: 1000, grace_ms: 5 }, ..limits() };
    // Each millisecond it takes so many bytes; 50 are left for it at every look, or 5.
    let slow_after_ms = |bytes_per_ms: u64, ahead: u64| {
        let mut deadlines = Deadlines::new(0, 0, false);
        deadlines.output_began(0, 0);
        (1..200).find(|now_ms| {
            let taken = now_ms * bytes_per_ms / 4;
            let verdict = deadlines.looked_at_output(
                &limits,
                *now_ms,
                taken,
                taken / ahead * ahead + ahead,
                true,
            );
            verdict == Verdict::TooSlow
        })
    };
    assert_eq!(slow_after_ms(2, 5), None, "what is left is little");
    assert_eq!(slow_after_ms(4, 1_000), None, "as fast as it must be");
    let found_ms = slow_after_ms(2, 1_000).expect("half as fast as it must be");
    assert!((10..=14).contains(&found_ms), "the grace is used up at twice its length: {found_ms}");
}

#[test]
fn a_lifetime_is_never_longer_than_set_and_shorter_by_a_tenth_at_most() {
    let mut ends: Vec<u64> = (0..=u16::MAX)
        .step_by(97)
        .map(|jitter| Deadlines::new(0, jitter, false).lifetime_end_ms(&limits()))
        .collect();
    assert!(ends.iter().all(|end_ms| (900..=1000).contains(end_ms)));
    ends.dedup();
    assert!(ends.len() > 90, "{} different ones", ends.len());

    let mut deadlines = Deadlines::new(0, u16::MAX, false);
    deadlines.set(&limits(), DeadlineKind::Idle, 7);
    assert_eq!(deadlines.lifetime_end_ms(&limits()), 900, "set is what was set, and nothing else");
    deadlines.set(&limits(), DeadlineKind::Lifetime, 1000);
    assert_eq!(deadlines.lifetime_end_ms(&limits()), 1000);
    deadlines.retire(&limits(), 1001);
    deadlines.received(1001);
    assert_eq!(next(&deadlines, 1020, false), (1026, Expired::Retired));
}

#[test]
fn a_heartbeat_is_due_after_silence_and_forgives_a_pause_of_ours() {
    let limits = Limits { heartbeat_ms: 20, heartbeat_timeout_ms: 5, ..limits() };
    let next = |deadlines: &Deadlines, resumed_ms| {
        let next = deadlines.next(&limits, Moment { now_ms: 150, waits: true, resumed_ms });
        (next.at_ms, next.expired)
    };
    for jitter in [0, u16::MAX] {
        let period_ms = if jitter == 0 { 18 } else { 22 };
        let mut deadlines = Deadlines::new(100, jitter, true);
        deadlines.received(100);
        assert_eq!(next(&deadlines, 0), (100 + period_ms, Expired::Beat));
        deadlines.asked(123);
        assert_eq!(next(&deadlines, 0), (128, Expired::Heartbeat));
        assert_eq!(next(&deadlines, 150), (150 + period_ms, Expired::Heartbeat));
        deadlines.received(125);
        assert_eq!(next(&deadlines, 0), (125 + period_ms, Expired::Beat));
        deadlines.half_closed(126);
        assert!(!matches!(next(&deadlines, 0).1, Expired::Beat), "it can't answer any more");
    }
}

#[test]
fn the_last_stage_overrides_all_and_the_extremes_do_not_overflow() {
    let mut deadlines = Deadlines::new(u64::MAX - 1, u16::MAX, true);
    assert_eq!(next(&deadlines, u64::MAX, true).0, u64::MAX);
    deadlines.asked(3);
    deadlines.enter_last_stage(Expired::Grace, 7);
    assert_eq!(next(&deadlines, 0, true), (7, Expired::Grace));
}

/// What has happened to a connection, as the rules of the documentation read it.
struct Truth {
    first_byte: bool,
    /// The last byte in either direction.
    byte_ms: u64,
    waits_since_ms: Option<u64>,
    busy_since_ms: u64,
    message_ms: Option<u64>,
    half_closed_ms: Option<u64>,
}

impl Truth {
    /// When a kind that runs is due at the earliest, and at the latest.
    fn due_ms(&self, kind: DeadlineKind, limit_ms: u64) -> Option<(u64, u64)> {
        let since_ms = match kind {
            DeadlineKind::FirstByte if !self.first_byte => 0,
            DeadlineKind::Message => self.message_ms?,
            DeadlineKind::Idle => self.waits_since_ms?.max(self.byte_ms),
            DeadlineKind::Handler if self.waits_since_ms.is_none() => {
                self.busy_since_ms.max(self.byte_ms)
            }
            DeadlineKind::HalfClose if self.waits_since_ms.is_none() => {
                self.half_closed_ms?.max(self.byte_ms)
            }
            DeadlineKind::Lifetime => {
                return Some((limit_ms - limit_ms / 10, limit_ms + limit_ms / 8));
            }
            _ => return None,
        };
        Some((since_ms + limit_ms, since_ms + limit_ms + limit_ms / 8 + 1))
    }
}

/// A connection's one entry in the wheel, which comes as late as the wheel may be.
struct Reminder {
    latest_ms: u64,
    fires_ms: u64,
}

fn arm(reminder: &mut Option<Reminder>, next: Next, now_ms: u64, rng: &mut Rng) {
    if reminder.as_ref().is_some_and(|it| it.latest_ms <= next.latest_ms) {
        return;
    }
    let late_ms = next.at_ms.saturating_sub(now_ms) / 8;
    let fires_ms = next.at_ms + rng.below(late_ms + 1);
    *reminder = Some(Reminder { latest_ms: next.at_ms + late_ms, fires_ms });
}

/// One random life, until a deadline ends it.
fn live(seed: u64) -> DeadlineKind {
    let mut rng = Rng::new(seed);
    let mut limits = limits();
    for limit_ms in &mut limits.kinds_ms {
        let most = if rng.percent(20) { 2_000 } else { 300 };
        *limit_ms = 1 + rng.below(most);
    }
    let busy = 1 + rng.below(60);
    let mut deadlines = Deadlines::new(0, rng.next() as u16, false);
    let mut truth = Truth {
        first_byte: false,
        byte_ms: 0,
        waits_since_ms: None,
        busy_since_ms: 0,
        message_ms: None,
        half_closed_ms: None,
    };
    let mut reminder = None;
    for now_ms in 0..10_000 {
        let moment =
            |truth: &Truth| Moment { now_ms, waits: truth.waits_since_ms.is_some(), resumed_ms: 0 };
        if now_ms == 0 {
            arm(&mut reminder, deadlines.next(&limits, moment(&truth)), 0, &mut rng);
        }
        let mut arms = false;
        match rng.below(20 * busy) {
            0..4 if truth.half_closed_ms.is_none() => {
                deadlines.received(now_ms);
                (truth.first_byte, truth.byte_ms) = (true, now_ms);
                truth.busy_since_ms = if truth.waits_since_ms.take().is_some() {
                    now_ms
                } else {
                    truth.busy_since_ms
                };
            }
            4..10 if truth.waits_since_ms.is_none() && truth.half_closed_ms.is_none() => {
                deadlines.waits(now_ms);
                truth.waits_since_ms = Some(now_ms);
            }
            10..12 => {
                deadlines.sent(now_ms);
                (truth.byte_ms, arms) = (now_ms, true);
            }
            12 if truth.message_ms.is_none() => {
                deadlines.begin_message(now_ms, Opened::ByLayer, 0);
                (truth.message_ms, arms) = (Some(now_ms), true);
            }
            13..16 => {
                deadlines.end_message(Opened::ByLayer);
                truth.message_ms = None;
            }
            16 if truth.half_closed_ms.is_none() && rng.percent(10) => {
                deadlines.half_closed(now_ms);
                truth.half_closed_ms = Some(now_ms);
                (truth.busy_since_ms, truth.waits_since_ms, arms) = (now_ms, None, true);
            }
            _ => {}
        }
        let next = deadlines.next(&limits, moment(&truth));
        assert!(next.at_ms < u64::MAX, "no deadline");
        if arms {
            arm(&mut reminder, next, now_ms, &mut rng);
        }
        if reminder.as_ref().is_some_and(|it| it.fires_ms <= now_ms) {
            reminder = None;
            if next.at_ms <= now_ms {
                let Expired::Kind(kind) = next.expired else { panic!("{:?}", next.expired) };
                let limit_ms = limits.kinds_ms[kind as usize];
                let due_ms = truth.due_ms(kind, limit_ms).map(|(earliest_ms, _)| earliest_ms);
                assert!(due_ms.is_some_and(|due| due <= now_ms), "{kind:?} early at {now_ms} ms");
                return kind;
            }
            arm(&mut reminder, next, now_ms, &mut rng);
        }
        for kind in DeadlineKind::ALL {
            let due_ms = truth.due_ms(kind, limits.kinds_ms[kind as usize]);
            let in_time = due_ms.is_none_or(|(_, latest_ms)| now_ms <= latest_ms);
            assert!(in_time, "{kind:?} late at {now_ms} ms: {limits:?}, {deadlines:?}");
        }
    }
    panic!("outlived its lifetime");
}

#[test]
fn no_deadline_is_early_and_none_is_later_than_an_eighth_or_a_tick() {
    let ended = RefCell::new(Vec::new());
    for_seeds("lives", 3_000, |seed| ended.borrow_mut().push(live(seed)));
    let ended = ended.into_inner();
    for kind in DeadlineKind::ALL.into_iter().filter(|kind| *kind != DeadlineKind::WriteStall) {
        let count = ended.iter().filter(|end| **end == kind).count();
        assert!(ended.len() < 1_000 || count > 10, "{kind:?} ended {count} of {}", ended.len());
    }
}

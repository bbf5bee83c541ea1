//! What a test wants of the simulated kernel, beside what the seed says.

use std::collections::VecDeque;

use super::Met;

/// Faults that a test orders.
#[derive(Debug)]
pub(crate) struct Orders {
    /// Nothing happens, and no time passes, but by the test's calls.
    pub(crate) by_hand: bool,
    /// Until then no descriptor is free.
    pub(crate) no_descriptor_until_ns: u64,
    /// So many connections find one.
    pub(crate) streams_max: usize,
    /// So many of the next cancellations miss.
    pub(crate) cancels_missed: u32,
    /// What the next calls of `enter` answer.
    pub(crate) enter_errors: VecDeque<i32>,
    /// What the next connects meet.
    pub(crate) connects: VecDeque<Met>,
    /// What the next sends of datagrams answer.
    pub(crate) datagram_errors: VecDeque<i32>,
    /// It says that there is work which it has done already.
    pub(crate) cries_wolf: bool,
    /// One call of `enter` in so many is interrupted; 0 is none.
    pub(crate) interrupt_every: u64,
}

impl Default for Orders {
    fn default() -> Orders {
        Orders {
            by_hand: false,
            no_descriptor_until_ns: 0,
            streams_max: usize::MAX,
            cancels_missed: 0,
            enter_errors: VecDeque::new(),
            connects: VecDeque::new(),
            datagram_errors: VecDeque::new(),
            cries_wolf: false,
            interrupt_every: 0,
        }
    }
}

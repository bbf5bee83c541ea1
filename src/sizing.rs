//! Which receive buffers suit a connection: small ones for short messages, large ones where data
//! comes in bulk. Pure: it is told how much each receive has brought.
//!
//! A receive that fills its buffer and leaves some behind costs a further completion, buffer and
//! segment of the answer for each further piece. So a connection whose receives do so several times
//! in a row changes over to large buffers, and back when it has not needed them for a while. A
//! message that just fits is no sign. Changing means to cancel the receive once and to arm it
//! again.

use crate::config::Settings;
use crate::driver::Group;
use crate::sys::datagram::HEADER_BYTES;

/// What the receives of one connection have been like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizing {
    wanted: Group,
    armed: Group,
    /// Receives in a row that speak for the other group.
    streak: u8,
    /// How many of them it takes to go over to large buffers.
    grow_after: u8,
}

impl Sizing {
    pub(crate) fn new() -> Sizing {
        Sizing { wanted: Group::Small, armed: Group::Small, streak: 0, grow_after: GROW_AFTER }
    }

    /// The group to arm a receive with.
    pub(crate) fn arm(&mut self) -> Group {
        self.armed = self.wanted;
        self.armed
    }

    /// The group that the receive was last armed with.
    pub(crate) fn armed(&self) -> Group {
        self.armed
    }

    /// The armed receive draws from another group than it should.
    pub(crate) fn is_outgrown(&self) -> bool {
        self.wanted != self.armed
    }

    /// A receive has brought `bytes`, and perhaps left some behind; small buffers hold
    /// `small_bytes`.
    pub(crate) fn received(&mut self, bytes: usize, left_some: bool, small_bytes: usize) {
        let other = match self.wanted {
            Group::Small if bytes >= small_bytes && left_some => Group::Large,
            // It just fitted, or was the end of more.
            Group::Small if bytes == small_bytes => return,
            Group::Large if bytes <= small_bytes => Group::Small,
            _ => {
                self.streak = 0;
                return;
            }
        };
        self.streak += 1;
        let enough = if other == Group::Large { self.grow_after } else { SHRINK_AFTER };
        if self.streak == enough {
            self.wanted = other;
            self.streak = 0;
        }
    }

    /// There was no buffer left. True if a large one was asked for: then small ones have to do, and
    /// longer than before.
    pub(crate) fn large_is_missing(&mut self) -> bool {
        let asked = self.armed == Group::Large;
        if asked {
            let grow_after = self.grow_after.saturating_mul(2).min(GROW_AFTER_MAX);
            *self = Sizing { grow_after, ..Sizing::new() };
        }
        asked
    }
}

impl Settings {
    /// How large a buffer is that datagrams are received into: the payload of a large one.
    pub(crate) fn datagram_buffer_bytes(&self) -> u32 {
        self.large_buffer_bytes + HEADER_BYTES as u32
    }

    /// How many large buffers there are: none that are not larger than the small ones.
    pub(crate) fn large_buffers_made(&self) -> u32 {
        if self.large_buffer_bytes > self.buffer_bytes { self.large_buffers } else { 0 }
    }

    /// How much a receive brings that fills a small buffer; more than any does where there are no
    /// large ones.
    pub(crate) fn bulk_bytes(&self) -> usize {
        if self.large_buffers_made() > 0 { self.buffer_bytes as usize } else { usize::MAX }
    }
}

/// Full small buffers in a row after which large ones are worth the change.
const GROW_AFTER: u8 = 4;
const GROW_AFTER_MAX: u8 = 128;
/// Receives in a row that would have fitted into a small buffer, after which they are not.
const SHRINK_AFTER: u8 = 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::sys::bufs::Pool;

    fn after(lens: &[usize]) -> Sizing {
        let mut sizing = Sizing::new();
        for len in lens {
            sizing.received(*len, *len >= 4096, 4096);
        }
        sizing
    }

    /// A span of a buffer has 24 bits for its end.
    #[test]
    fn the_largest_buffers_that_may_be_asked_for_can_be_made() {
        let config = |bytes| Config::default().large_buffer_bytes(bytes).settings();
        let settings = config(8 * 1024 * 1024).expect("it is allowed");
        assert!(config(8 * 1024 * 1024 + 64).is_err());
        for bytes in [settings.large_buffer_bytes, settings.datagram_buffer_bytes()] {
            let pool = Pool::new(0, 2, bytes).expect("it is address space only");
            pool.give(usize::MAX, |_| {});
            assert_eq!(pool.lease(1, bytes).expect("it is given").len(), bytes as usize);
        }
    }

    #[test]
    fn bulk_goes_over_to_large_buffers_and_messages_stay_with_small_ones() {
        assert!(!after(&[4096; 3]).is_outgrown());
        assert!(after(&[4096; 4]).is_outgrown());
        // A message that is a little longer than a buffer, again and again.
        assert!(!after(&[4096, 900].repeat(100)).is_outgrown());
        assert!(!after(&[64; 1000]).is_outgrown());
    }

    #[test]
    fn messages_that_just_fit_stay_with_small_buffers() {
        let mut sizing = Sizing::new();
        (0..1000).for_each(|_| sizing.received(4096, false, 4096));
        assert!(!sizing.is_outgrown());
        // Two of them, again and again, are more than fits.
        (0..4).for_each(|n| sizing.received(4096, n % 2 == 0, 4096));
        assert!(!sizing.is_outgrown());
        (0..4).for_each(|n| sizing.received(4096, n % 2 == 0, 4096));
        assert!(sizing.is_outgrown());
    }

    #[test]
    fn a_connection_that_no_longer_needs_large_buffers_gives_them_up() {
        let mut sizing = after(&[4096; 4]);
        assert_eq!(sizing.arm(), Group::Large);
        for _ in 0..31 {
            sizing.received(64, false, 4096);
        }
        sizing.received(65_536, true, 4096);
        assert!(!sizing.is_outgrown());
        for _ in 0..32 {
            sizing.received(64, false, 4096);
        }
        assert!(sizing.is_outgrown());
        assert_eq!(sizing.arm(), Group::Small);
    }

    #[test]
    fn without_a_large_buffer_a_small_one_does() {
        let mut sizing = after(&[4096; 4]);
        assert!(!sizing.large_is_missing(), "a small one was missing");
        assert_eq!(sizing.arm(), Group::Large);
        assert!(sizing.large_is_missing());
        assert_eq!(sizing.arm(), Group::Small);
        for (full, outgrown) in [(7, false), (1, true)] {
            (0..full).for_each(|_| sizing.received(4096, true, 4096));
            assert_eq!(sizing.is_outgrown(), outgrown, "it is more patient now");
        }
    }
}

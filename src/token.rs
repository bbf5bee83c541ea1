//! The 64 bits that travel with an operation through the kernel and back.
//!
//! ```text
//! 63      56 55            32 31             0
//! +---------+----------------+----------------+
//! |  kind   |   generation   |      slot      |
//! +---------+----------------+----------------+
//! ```
//! A slot is reused, so its number alone would let a late completion reach the slot's next tenant.
//! The generation tells the tenants apart; it wraps after 2^24 reuses of one slot, which a slot
//! can't do while an operation of its first tenant is in flight, since a slot is only freed when
//! nothing is.

/// What an operation is, and so what its completion means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Multishot accept on a listener; the slot is the listener's index.
    Accept = 1,
    /// Multishot receive of a connection.
    Receive,
    /// The one send in flight of a connection.
    Send,
    /// A poll for errors and hang-ups while a connection's receive is paused.
    Hangup,
    /// The poll on the core's eventfd.
    Doorbell,
    /// A cancellation of another operation.
    Cancel,
    /// An update of the ring's table of open files.
    File,
    /// A receive into a large buffer, just once.
    BulkReceive,
    /// The ring's standing timer.
    Timer,
    /// A connection to another address; the slot is that of an attempt.
    Connect,
    /// A cancellation of one.
    CancelConnect,
    /// Multishot receive of a UDP socket.
    ReceiveDatagrams = 12,
    /// One of the sends in flight of a UDP socket; the slot is the send's own.
    SendDatagram,
    /// A cancellation of an operation of a UDP socket.
    CancelDatagrams,
}

/// Names one operation in flight; unique among those of one core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Token(u64);

impl Token {
    pub(crate) const fn new(kind: Kind, slot: u32, generation: u32) -> Token {
        let generation = (generation & GENERATION_MASK) as u64;
        Token((kind as u64) << 56 | generation << 32 | slot as u64)
    }

    /// Takes the bits of a completion; the kernel hands them back unchanged, but nothing relies
    /// on that: see [`Token::kind`].
    pub(crate) fn from_bits(bits: u64) -> Token {
        Token(bits)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// `None` for bits that no [`Token::new`] made; such a completion is counted and ignored.
    pub(crate) fn kind(self) -> Option<Kind> {
        Some(match self.0 >> 56 {
            1 => Kind::Accept,
            2 => Kind::Receive,
            3 => Kind::Send,
            4 => Kind::Hangup,
            5 => Kind::Doorbell,
            6 => Kind::Cancel,
            7 => Kind::File,
            8 => Kind::BulkReceive,
            9 => Kind::Timer,
            10 => Kind::Connect,
            11 => Kind::CancelConnect,
            12 => Kind::ReceiveDatagrams,
            13 => Kind::SendDatagram,
            14 => Kind::CancelDatagrams,
            _ => return None,
        })
    }

    pub(crate) fn slot(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn generation(self) -> u32 {
        (self.0 >> 32) as u32 & GENERATION_MASK
    }
}

/// Generations are compared in the width that a token has room for.
pub(crate) const GENERATION_MASK: u32 = (1 << 24) - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_survives_the_round_trip() {
        let kinds: Vec<Kind> = (0..=u8::MAX)
            .filter_map(|kind| Token::from_bits(u64::from(kind) << 56).kind())
            .collect();
        assert_eq!(kinds.len(), 14);
        for kind in kinds {
            for slot in [0, 1, 77, u32::MAX] {
                for generation in [0, 1, GENERATION_MASK] {
                    let token = Token::from_bits(Token::new(kind, slot, generation).bits());
                    assert_eq!(token.kind(), Some(kind));
                    assert_eq!(token.slot(), slot);
                    assert_eq!(token.generation(), generation);
                }
            }
        }
    }

    #[test]
    fn generation_wraps_into_its_24_bits_and_leaves_the_kind_alone() {
        let token = Token::new(Kind::Send, 3, GENERATION_MASK + 2);
        assert_eq!(token.generation(), 1);
        assert_eq!(token.kind(), Some(Kind::Send));
    }

    #[test]
    fn foreign_bits_have_no_kind() {
        assert_eq!(Token::from_bits(0).kind(), None);
        assert_eq!(Token::from_bits(u64::MAX).kind(), None);
    }
}

//! How far the record that is being received has come. Pure.

/// Follows the borders of records (RFC 8446, section 5.1): a type, a version and a length in five
/// bytes, and as many bytes as that says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    so_far: usize,
    length: usize,
}

impl Record {
    /// How many bytes of an incomplete record have come; 0 between records.
    pub(super) fn so_far(self) -> usize {
        self.so_far
    }

    /// Goes on over what was received. True when a record has come to its end by it.
    pub(super) fn advance(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while let Some(first) = bytes.first() {
            let count = if self.so_far < HEADER {
                // The length stands in the last two bytes of the header.
                self.length = (self.length << 8 | usize::from(*first)) & 0xffff;
                1
            } else {
                bytes.len().min(HEADER + self.length - self.so_far)
            };
            self.so_far += count;
            if self.so_far >= HEADER && self.so_far == HEADER + self.length {
                *self = Record::default();
                ended = true;
            }
            bytes = &bytes[count..];
        }
        ended
    }
}

const HEADER: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_are_found_wherever_the_bytes_are_split() {
        let mut stream = Vec::new();
        let mut borders = vec![0];
        for length in [0usize, 1, 255, 256, 16_401, 65_535, 3] {
            let [_, _, .., high, low] = length.to_be_bytes();
            stream.extend([23, 3, 3, high, low]);
            stream.extend(std::iter::repeat_n(0xff, length));
            borders.push(stream.len());
        }
        for piece in [1, 2, 3, 5, 7, 4096, stream.len()] {
            let (mut record, mut at) = (Record::default(), 0);
            for bytes in stream.chunks(piece) {
                let ended = record.advance(bytes);
                let passed =
                    borders.iter().any(|border| (at + 1..=at + bytes.len()).contains(border));
                assert_eq!(ended, passed, "after {at}");
                at += bytes.len();
                let border = borders.iter().rev().find(|border| **border <= at);
                assert_eq!(record.so_far(), at - border.expect("the first is 0"), "after {at}");
            }
            assert_eq!(record, Record::default());
        }
    }
}

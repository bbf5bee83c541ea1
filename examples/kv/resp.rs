//! Writing RESP: a reply, or a request for another core.

/// Writes a request of these words.
pub(crate) fn request(out: &mut Vec<u8>, words: &[&[u8]]) {
    header(out, b'*', words.len() as i64);
    words.iter().for_each(|word| bulk(out, word));
}

pub(crate) fn bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    header(out, b'$', bytes.len() as i64);
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

pub(crate) fn error(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// A number behind its mark: an integer's, an array's or a string's length.
pub(crate) fn header(out: &mut Vec<u8>, mark: u8, value: i64) {
    out.push(mark);
    decimal(out, value);
    out.extend_from_slice(b"\r\n");
}

fn decimal(out: &mut Vec<u8>, value: i64) {
    out.extend_from_slice(digits(value, &mut [0; 20]));
}

/// A number's digits, and its sign if it is negative.
pub(crate) fn digits(value: i64, place: &mut [u8; 20]) -> &[u8] {
    let mut at = place.len();
    let mut left = value.unsigned_abs();
    loop {
        at -= 1;
        place[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    if value < 0 {
        at -= 1;
        place[at] = b'-';
    }
    &place[at..]
}

pub(crate) const NIL: &[u8] = b"$-1\r\n";

//! Requests in RESP, the protocol of Redis: arrays of strings, or lines of words
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).

/// Finds the next request in what has come, and puts its words into `words`. Returns how long it
/// is; 0 when it has not come whole.
///
/// # Errors
/// What is no request, or exceeds a limit: the connection can't go on.
pub(crate) fn parse<'a>(input: &'a [u8], words: &mut Vec<&'a [u8]>) -> Result<usize, &'static str> {
    words.clear();
    match input.first() {
        None => Ok(0),
        Some(b'*') => parse_array(input, words),
        Some(_) => parse_line(input, words),
    }
}

fn parse_array<'a>(input: &'a [u8], words: &mut Vec<&'a [u8]>) -> Result<usize, &'static str> {
    let too_many = "Protocol error: invalid multibulk length";
    let Some((count, mut at)) = number(input, 1, too_many)? else { return Ok(0) };
    if count > WORDS_MAX {
        return Err(too_many);
    }
    for _ in 0..count.max(0) {
        match input.get(at) {
            None => return Ok(0),
            Some(b'$') => {}
            Some(_) => return Err("Protocol error: expected '$'"),
        }
        let too_long = "Protocol error: invalid bulk length";
        let Some((bytes, start)) = number(input, at + 1, too_long)? else { return Ok(0) };
        if !(0..=WORD_BYTES_MAX).contains(&bytes) {
            return Err(too_long);
        }
        let end = start + bytes as usize;
        if end + 2 > REQUEST_BYTES_MAX {
            return Err("Protocol error: too big request");
        }
        match input.get(end..end + 2) {
            None => return Ok(0),
            Some(b"\r\n") => words.push(&input[start..end]),
            Some(_) => return Err("Protocol error: expected CRLF"),
        }
        at = end + 2;
    }
    Ok(at)
}

/// The number of a line that starts at `at`, and where the next line starts.
fn number(
    input: &[u8],
    at: usize,
    fault: &'static str,
) -> Result<Option<(i64, usize)>, &'static str> {
    let (negative, first) = match input.get(at) {
        Some(b'-') => (true, at + 1),
        _ => (false, at),
    };
    let mut value = 0i64;
    for (index, byte) in input.iter().enumerate().skip(first).take(DIGITS_MAX) {
        match byte {
            b'0'..=b'9' => value = value * 10 + i64::from(byte - b'0'),
            b'\r' if index > first => {
                let value = if negative { -value } else { value };
                return Ok((input.len() > index + 1).then_some((value, index + 2)));
            }
            _ => return Err(fault),
        }
    }
    if input.len() < first + DIGITS_MAX { Ok(None) } else { Err(fault) }
}

fn parse_line<'a>(input: &'a [u8], words: &mut Vec<&'a [u8]>) -> Result<usize, &'static str> {
    let Some(end) = input.iter().take(LINE_BYTES_MAX).position(|byte| *byte == b'\n') else {
        let too_long = input.len() >= LINE_BYTES_MAX;
        return if too_long { Err("Protocol error: too big inline request") } else { Ok(0) };
    };
    let line = input[..end].split(u8::is_ascii_whitespace);
    words.extend(line.filter(|word| !word.is_empty()));
    Ok(end + 1)
}

const DIGITS_MAX: usize = 12;
const WORDS_MAX: i64 = 1024;
const WORD_BYTES_MAX: i64 = 1024 * 1024;
const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;
const LINE_BYTES_MAX: usize = 64 * 1024;

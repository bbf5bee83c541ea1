//! The forms a value can have, and the checks of a text against them. Pure, and bounded in memory
//! whatever the text.

use std::borrow::Cow;
use std::net::SocketAddr;

/// The greatest CPU number that `SLIPRING_CPUS` takes.
const CPU_MAX: u16 = 4095;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one of them a terminator or the mark of
/// an abstract name, <https://man7.org/linux/man-pages/man7/unix.7.html>.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// Characters of a refused value that an error repeats.
const QUOTED_CHARS_MAX: usize = 80;

/// What a variable's text must look like.
#[derive(Debug)]
pub(super) enum Form {
    /// A whole number.
    Within {
        min: u64,
        max: u64,
    },
    /// A whole number, or 0, which switches off what the variable limits.
    OffOr {
        min: u64,
        max: u64,
    },
    PowerOfTwo {
        min: u64,
        max: u64,
    },
    MultipleOf {
        step: u64,
        min: u64,
        max: u64,
    },
    OneOf(&'static [&'static str]),
    Addresses,
    Cpus,
}

impl Form {
    /// Says what is wrong with the text, if anything is.
    pub(super) fn check(&self, text: &str) -> Result<(), String> {
        match *self {
            Form::Within { min, max } => within(number(text)?, min, max),
            Form::OffOr { .. } if number(text)? == 0 => Ok(()),
            Form::OffOr { min, max } => within(number(text)?, min, max),
            Form::PowerOfTwo { min, max } => match number(text)? {
                value if !value.is_power_of_two() => Err("not a power of two".into()),
                value => within(value, min, max),
            },
            Form::MultipleOf { step, min, max } => match number(text)? {
                value if !value.is_multiple_of(step) => Err(format!("not a multiple of {step}")),
                value => within(value, min, max),
            },
            Form::OneOf(words) if words.contains(&text) => Ok(()),
            Form::OneOf(_) => Err("not one of the words".into()),
            Form::Addresses => addresses(text),
            Form::Cpus => cpus(text).map(drop),
        }
    }
}

/// Digits only: no sign, no space, no unit.
fn number(text: &str) -> Result<u64, String> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a whole number".into());
    }
    text.parse().map_err(|_| "out of bounds".into())
}

fn within(value: u64, min: u64, max: u64) -> Result<(), String> {
    if (min..=max).contains(&value) { Ok(()) } else { Err("out of bounds".into()) }
}

/// The items of a comma-separated list.
pub(super) fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim)
}

fn addresses(text: &str) -> Result<(), String> {
    items(text).try_for_each(address)
}

fn address(item: &str) -> Result<(), String> {
    let Some(path) = item.strip_prefix("unix:") else {
        let parsed = item.parse::<SocketAddr>().map(drop);
        return parsed.map_err(|_| format!("{} is not an address", quoted(item)));
    };
    let name = path.strip_prefix('@').unwrap_or(path);
    if name.is_empty() || name.contains('\0') {
        return Err(format!("{} names no socket", quoted(item)));
    }
    if path.len() > UNIX_PATH_BYTES_MAX {
        return Err(format!("{} is longer than {UNIX_PATH_BYTES_MAX} bytes", quoted(item)));
    }
    Ok(())
}

/// The CPUs of a list such as `0-3,8`, in the order given; `None` is `auto`.
pub(super) fn cpus(text: &str) -> Result<Option<Vec<u16>>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let mut cpus = Vec::new();
    let mut seen = [false; CPU_MAX as usize + 1];
    for item in items(text) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last) = (cpu(first)?, cpu(last)?);
        if first > last {
            return Err(format!("the range {item} runs backwards"));
        }
        for cpu in first..=last {
            if std::mem::replace(&mut seen[usize::from(cpu)], true) {
                return Err(format!("CPU {cpu} is named twice"));
            }
            cpus.push(cpu);
        }
    }
    Ok(Some(cpus))
}

fn cpu(text: &str) -> Result<u16, String> {
    match number(text).map(u16::try_from) {
        Ok(Ok(cpu)) if cpu <= CPU_MAX => Ok(cpu),
        Ok(_) => Err(format!("CPU {} is above {CPU_MAX}", shortened(text))),
        Err(_) => Err(format!("{} is not a CPU's number", quoted(text))),
    }
}

/// The text in quotes, its control characters escaped, cut short if it is long.
pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", shortened(text))
}

/// The text, or its beginning and an ellipsis.
pub(super) fn shortened(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => Cow::Owned(format!("{}...", &text[..end])),
        None => Cow::Borrowed(text),
    }
}

//! What a variable is, how its value is written as text, and the macros that unfold the table.

use super::form::{Form, shortened};
use super::{Balance, HalfClose, Overload, ReportFormat, VARIABLES};
use crate::error::{Error, ErrorKind, Result};

/// What the name of each variable starts with.
pub(super) const PREFIX: &str = "SLIPRING_";

/// One row of the table.
#[derive(Debug)]
pub(super) struct Variable {
    pub(super) name: &'static str,
    /// The default as it would be written in the environment.
    pub(super) default: fn() -> String,
    pub(super) form: Form,
    /// Unit and bounds in words.
    pub(super) bounds: &'static str,
    pub(super) doc: &'static str,
}

/// Finds a variable by its full name; the error names the nearest one there is.
pub(super) fn find(name: &str) -> Result<&'static Variable> {
    if let Some(variable) = VARIABLES.iter().find(|variable| variable.name == name) {
        return Ok(variable);
    }
    let name = shortened(name);
    let nearest = VARIABLES.iter().min_by_key(|variable| distance(&name, variable.name));
    let nearest = nearest.expect("invariant: the table has rows").name;
    Err(Error::new(ErrorKind::Config, format!("{} (environment)", name.escape_debug()))
        .because(format!("no such variable; the nearest known name is {nearest}")))
}

/// The number of characters to insert, remove, replace or swap with their neighbour that turns `a`
/// into `b` (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let (mut before, mut last) = (Vec::new(), (0..=b.len()).collect::<Vec<_>>());
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut cost = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                let swapped: usize = before[j - 2];
                cost = cost.min(swapped + 1);
            }
            row.push(cost);
        }
        (before, last) = (last, row);
    }
    last[b.len()]
}

/// A type that a setter takes, and its text in the environment.
pub(super) trait Written {
    fn written(&self) -> String;
}

/// A type that a field of `Settings` has, read back from a text that passed its form's check.
pub(super) trait Plain: Written + Copy {
    fn read(text: &str) -> Option<Self>;
}

/// A type with few values, each of which is a word in the environment.
trait Words: Copy + PartialEq + 'static {
    const WORDS: &'static [(Self, &'static str)];
}

impl Words for bool {
    const WORDS: &'static [(bool, &'static str)] = &[(false, "0"), (true, "1")];
}

impl Words for Option<bool> {
    const WORDS: &'static [(Option<bool>, &'static str)] =
        &[(None, "auto"), (Some(false), "0"), (Some(true), "1")];
}

impl Words for ReportFormat {
    const WORDS: &'static [(ReportFormat, &'static str)] =
        &[(ReportFormat::Text, "text"), (ReportFormat::Json, "json")];
}

impl Words for Overload {
    const WORDS: &'static [(Overload, &'static str)] =
        &[(Overload::Queue, "queue"), (Overload::Reject, "reject")];
}

impl Words for Balance {
    const WORDS: &'static [(Balance, &'static str)] =
        &[(Balance::Hash, "hash"), (Balance::Cpu, "cpu"), (Balance::Least, "least")];
}

impl Words for HalfClose {
    const WORDS: &'static [(HalfClose, &'static str)] =
        &[(HalfClose::Finish, "finish"), (HalfClose::Abort, "abort")];
}

impl<T: Words> Written for T {
    fn written(&self) -> String {
        let word = T::WORDS.iter().find(|(value, _)| value == self);
        word.expect("invariant: WORDS lists every value").1.to_owned()
    }
}

impl<T: Words> Plain for T {
    fn read(text: &str) -> Option<T> {
        T::WORDS.iter().find(|(_, word)| *word == text).map(|(value, _)| *value)
    }
}

impl Written for &str {
    fn written(&self) -> String {
        (*self).to_owned()
    }
}

macro_rules! plain_numbers {
    ($($number:ty),+) => {$(
        impl Written for $number {
            fn written(&self) -> String {
                self.to_string()
            }
        }

        impl Plain for $number {
            fn read(text: &str) -> Option<$number> {
                text.parse().ok()
            }
        }
    )+};
}

plain_numbers!(u32, u64, usize);

/// Unfolds the table: a `static` for each variable, `VARIABLES`, the setters, and `Settings`.
macro_rules! variables {
    (lists { $($lists:tt)+ } settings { $($settings:tt)+ }) => {
        rows! { $($lists)+ $($settings)+ }
        fields! { $($settings)+ }
    };
}

macro_rules! rows {
    ($(
        $(#[doc = $doc:literal])+
        $NAME:ident $setter:ident: $kind:ty = $default:expr, [$($bounds:tt)+];
    )+) => {
        $(static $NAME: Variable = Variable {
            name: concat!("SLIPRING_", stringify!($NAME)),
            default: || <$kind as Written>::written(&$default),
            form: form!($($bounds)+),
            bounds: bounds!($($bounds)+),
            doc: concat!($($doc),+),
        };)+

        /// Every variable, in the order of the table.
        static VARIABLES: &[&Variable] = &[$(&$NAME),+];

        /// One setter for each variable.
        impl Config {
            $(
                $(#[doc = $doc])+
                #[doc = ""]
                #[doc = concat!("- Default: `", stringify!($default), "`.")]
                #[doc = concat!("- Bounds: ", bounds!($($bounds)+), ".")]
                #[doc = concat!("- In the environment: `SLIPRING_", stringify!($NAME), "`.")]
                #[doc = ""]
                #[doc = "# Examples"]
                #[doc = ""]
                #[doc = "```"]
                #[doc = "use slipring::{Balance, Config, HalfClose, Overload, ReportFormat};"]
                #[doc = ""]
                #[doc = concat!(
                    "let config = Config::default().",
                    stringify!($setter), "(", stringify!($default), ");",
                )]
                #[doc = "config.validate()?; // an error where the value is out of bounds"]
                #[doc = "# Ok::<(), slipring::Error>(())"]
                #[doc = "```"]
                #[must_use]
                pub fn $setter(self, value: $kind) -> Config {
                    self.set(&$NAME, value.written(), Source::Code)
                }
            )+
        }
    };
}

macro_rules! fields {
    ($(
        $(#[doc = $doc:literal])+
        $NAME:ident $setter:ident: $kind:ty = $default:expr, [$($bounds:tt)+];
    )+) => {
        /// The values that a core works with, checked and in their types.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct Settings {
            $(
                $(#[doc = $doc])+
                pub(crate) $setter: $kind,
            )+
        }

        impl Settings {
            fn read(config: &Config) -> Result<Settings> {
                Ok(Settings { $($setter: config.read(&$NAME)?),+ })
            }
        }
    };
}

/// The forms that bounds have in the table, in words for the user.
macro_rules! bounds {
    (addresses) => { "addresses, comma separated, each `ip:port`, `unix:path` or `unix:@name`" };
    (cpus) => { "`auto`, or CPUs 0 to 4095 and ranges, comma separated, such as `0-3,8`" };
    ($unit:ident: power of two, $min:literal..=$max:literal) => {
        concat!(stringify!($unit), ", a power of two, ", $min, " to ", $max)
    };
    ($unit:ident: multiple of $step:literal, $min:literal..=$max:literal) => {
        concat!(stringify!($unit), ", a multiple of ", $step, ", ", $min, " to ", $max)
    };
    ($unit:ident: 0 = off, $min:literal..=$max:literal) => {
        concat!(stringify!($unit), ", ", $min, " to ", $max, ", or 0 = off")
    };
    ($unit:ident: $min:literal..=$max:literal) => {
        concat!(stringify!($unit), ", ", $min, " to ", $max)
    };
    ($first:tt $(| $word:tt)+) => {
        concat!("`", stringify!($first), "`" $(, " or `", stringify!($word), "`")+)
    };
}

/// The same forms for the parser.
macro_rules! form {
    (addresses) => { Form::Addresses };
    (cpus) => { Form::Cpus };
    ($unit:ident: power of two, $min:literal..=$max:literal) => {
        Form::PowerOfTwo { min: $min, max: $max }
    };
    ($unit:ident: multiple of $step:literal, $min:literal..=$max:literal) => {
        Form::MultipleOf { step: $step, min: $min, max: $max }
    };
    ($unit:ident: 0 = off, $min:literal..=$max:literal) => {
        Form::OffOr { min: $min, max: $max }
    };
    ($unit:ident: $min:literal..=$max:literal) => { Form::Within { min: $min, max: $max } };
    ($($word:tt)|+) => { Form::OneOf(&[$(stringify!($word)),+]) };
}

//! The variables: one table that the setters, the environment's parser, the README and
//! [`Config::explain`] all come from.
//!
//! To add a variable, add one entry to the table below; `Settings` then has a field of that name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;

use self::form::Form;
use self::variable::{PREFIX, Plain, Variable, Written};
use crate::error::{Error, ErrorKind, Result};

pub use self::explain::Explanation;

mod explain;
mod form;
#[macro_use]
mod variable;
#[cfg(test)]
mod tests;

// An entry: what it does, the variable and its setter, the type and the default, the bounds.
// The bounds' forms are listed at `bounds!`.
variables! {
    // Lists, each with an accessor of its own: `Config::listen_addresses`, `Config::cpu_list`.
    lists {
        /// Addresses to listen on, comma separated: `127.0.0.1:7000`, `[::1]:7000`,
        /// `unix:/run/x.sock`, `unix:@name`. For programs that ask for it; the library alone binds
        /// nothing.
        LISTEN listen: &str = "127.0.0.1:7000", [addresses];

        /// The CPUs to run a core on each, such as `0-3,8`; `auto` is the affinity mask, capped by
        /// the cgroup's CPU quota.
        CPUS cpus: &str = "auto", [cpus];
    }

    // Plain values, each a field of `Settings`.
    settings {
        /// Whether each core's thread is pinned to its CPU; `auto` (in code `None`) pins unless a
        /// cgroup CPU quota allows fewer CPUs than there are cores.
        PIN pin: Option<bool> = None, [auto | 0 | 1];

        /// Length of a core's submission queue.
        SQ_ENTRIES sq_entries: u32 = 512, [entries: power of two, 8..=32_768];

        /// Length of a core's completion queue, at least twice `SLIPRING_SQ_ENTRIES`.
        CQ_ENTRIES cq_entries: u32 = 4_096, [entries: power of two, 16..=65_536];

        /// Receive buffers that a core provides to the kernel.
        BUFFERS buffers: u32 = 512, [buffers: power of two, 8..=32_768];

        /// Size of a receive buffer.
        BUFFER_BYTES buffer_bytes: u32 = 4_096, [bytes: multiple of 64, 256..=1_048_576];

        /// Connections that may wait in a listener's queue; the kernel caps it at
        /// `net.core.somaxconn`.
        BACKLOG backlog: u32 = 4_096, [connections: 1..=65_535];

        /// Connections of the whole process, shared out to the cores.
        CONNECTIONS_MAX connections_max: usize = 10_000, [connections: 1..=4_000_000];

        /// Whether small writes leave at once (`TCP_NODELAY`).
        NODELAY nodelay: bool = true, [0 | 1];

        /// Silence of a peer before the kernel's first keepalive probe.
        KEEPALIVE_IDLE_S keepalive_idle_s: u32 = 30, [seconds: 1..=32_767];

        /// Time between two keepalive probes.
        KEEPALIVE_INTERVAL_S keepalive_interval_s: u32 = 10, [seconds: 1..=32_767];

        /// Unanswered keepalive probes after which the peer is dead; the kernel ignores the number
        /// while `SLIPRING_USER_TIMEOUT_MS` is on.
        KEEPALIVE_COUNT keepalive_count: u32 = 3, [probes: 1..=127];

        /// How long sent data may stay unacknowledged, or the peer's window shut, before the kernel
        /// ends the connection (`TCP_USER_TIMEOUT`).
        USER_TIMEOUT_MS user_timeout_ms: u64 = 60_000,
            [milliseconds: 0 = off, 1_000..=3_600_000];

        /// Longest time from accept to the first byte received.
        FIRST_BYTE_MS first_byte_ms: u64 = 10_000, [milliseconds: 1..=3_600_000];

        /// Longest time without a byte in either direction.
        IDLE_MS idle_ms: u64 = 75_000, [milliseconds: 1..=86_400_000];

        /// Longest time that queued output may wait while the peer takes nothing; noticed at most a
        /// quarter later.
        WRITE_STALL_MS write_stall_ms: u64 = 30_000, [milliseconds: 1..=3_600_000];

        /// Greatest age of a connection.
        LIFETIME_MS lifetime_ms: u64 = 86_400_000, [milliseconds: 1..=31_536_000_000];

        /// How long unread input is read and thrown away after our FIN, so that the peer gets the
        /// last response and no reset.
        LINGER_MS linger_ms: u64 = 2_000, [milliseconds: 0 = off, 1..=60_000];

        /// Bytes received and not yet taken by the handler above which a connection's receive is
        /// paused; at least `SLIPRING_BUFFER_BYTES`.
        RECEIVE_QUEUE_BYTES receive_queue_bytes: usize = 65_536, [bytes: 256..=67_108_864];

        /// Bytes of a connection accepted by `send` and `write` and not yet in the kernel above
        /// which `send` waits.
        SEND_QUEUE_BYTES send_queue_bytes: usize = 262_144, [bytes: 1_024..=268_435_456];

        /// Task polls in one turn of a core.
        TASK_BUDGET task_budget: u32 = 256, [polls: 1..=65_536];

        /// Deadlines handled in one turn of a core.
        EXPIRY_BUDGET expiry_budget: u32 = 256, [deadlines: 1..=65_536];

        /// Completions handled in one turn of a core.
        COMPLETION_BUDGET completion_budget: u32 = 1_024, [completions: 16..=65_536];

        /// Tasks of a core, the connections' handlers included.
        TASKS_MAX tasks_max: usize = 1_000_000, [tasks: 1..=16_000_000];

        /// How long a drain goes on accepting after it has reported not ready.
        LAMEDUCK_MS lameduck_ms: u64 = 0, [milliseconds: 0..=3_600_000];

        /// A drain's deadline where the caller names none, as on a signal.
        DRAIN_MS drain_ms: u64 = 25_000, [milliseconds: 1..=3_600_000];

        /// How long a drain keeps a connection that has not sent a byte.
        NEW_GRACE_MS new_grace_ms: u64 = 1_000, [milliseconds: 0..=60_000];

        /// How long a handler whose connection was ended has to notice, before its future is
        /// dropped. In a drain it lies before the deadline and takes at most a tenth of it.
        FORCE_GRACE_MS force_grace_ms: u64 = 100, [milliseconds: 0..=10_000];

        /// How long a bind is retried while a predecessor still holds the address.
        BIND_RETRY_MS bind_retry_ms: u64 = 1_000, [milliseconds: 0..=60_000];

        /// How a program should print its reports; the library itself prints nothing.
        REPORT report: ReportFormat = ReportFormat::Text, [text | json];
    }
}

/// The configuration of a server: what was set, by whom, and a default for everything else.
///
/// The defaults are safe for the open Internet, and all of them are finite. Each variable has a
/// setter here and a name in the environment, `SLIPRING_` and the setter in capitals; the unit
/// stands last in both. What is set later wins, so a setter after [`from_env`](Config::from_env)
/// overrules the environment. A setter takes any value; [`validate`](Config::validate), which the
/// server's start calls, refuses a bad one. Nothing is clamped.
///
/// # Examples
///
/// ```
/// use slipring::Config;
///
/// let config = Config::default().connections_max(50_000).idle_ms(30_000);
/// config.validate()?;
/// # Ok::<(), slipring::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Config {
    given: BTreeMap<&'static str, Given>,
}

/// A value that does not come from the table, as it would be written in the environment.
#[derive(Clone, Debug)]
struct Given {
    text: String,
    source: Source,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Default,
    Environment,
    Code,
}

/// How a program prints its reports: the value of `SLIPRING_REPORT`.
///
/// # Examples
///
/// ```
/// use slipring::{Config, ReportFormat};
///
/// let config = Config::default().report(ReportFormat::Json);
/// assert_eq!(config.report_format(), ReportFormat::Json);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReportFormat {
    /// Lines for people, the default.
    #[default]
    Text,
    /// One JSON object, for machines.
    Json,
}

impl Config {
    /// Reads the variables that start with `SLIPRING_` from the environment of the process.
    ///
    /// Nothing else in the library reads the environment. An empty variable counts as unset. Of
    /// several bad variables the first by name is reported. How the values fit together is left to
    /// [`validate`](Config::validate), since code may still change them.
    ///
    /// # Errors
    ///
    /// - A name that no variable has: [`ErrorKind::Config`], with the nearest known name.
    /// - A value that is malformed, out of bounds or not UTF-8: [`ErrorKind::Config`], with the
    ///   variable, the value and the bounds.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let config = Config::from_env()?.idle_ms(30_000); // the environment, then the code
    /// # Ok::<(), slipring::Error>(())
    /// ```
    pub fn from_env() -> Result<Config> {
        Config::from_vars(std::env::vars_os())
    }

    fn from_vars(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Config> {
        let ours = |name: &OsString| name.as_encoded_bytes().starts_with(PREFIX.as_bytes());
        let sorted: BTreeMap<_, _> = vars.into_iter().filter(|(name, _)| ours(name)).collect();
        let mut config = Config::default();
        for (name, value) in &sorted {
            let variable = variable::find(&name.to_string_lossy())?;
            if value.is_empty() {
                continue;
            }
            config = config.set(variable, value.to_string_lossy().into(), Source::Environment);
            if value.to_str().is_none() {
                return Err(config.refuse(variable, "not UTF-8"));
            }
            config.check(variable)?;
        }
        Ok(config)
    }

    /// Checks every value against its bounds, and the values against each other.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`], for the first of these in the table's order:
    ///
    /// - A value is malformed or out of bounds.
    /// - `SLIPRING_CQ_ENTRIES` is less than twice `SLIPRING_SQ_ENTRIES`.
    /// - `SLIPRING_RECEIVE_QUEUE_BYTES` is less than `SLIPRING_BUFFER_BYTES`.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let error = Config::default().idle_ms(0).validate().unwrap_err();
    /// assert!(error.to_string().contains("SLIPRING_IDLE_MS"));
    /// ```
    pub fn validate(&self) -> Result<()> {
        self.settings().map(drop)
    }

    /// The values as plain fields, after [`validate`](Config::validate)'s checks.
    pub(crate) fn settings(&self) -> Result<Settings> {
        for variable in VARIABLES {
            self.check(variable)?;
        }
        let settings = Settings::read(self)?;
        if settings.cq_entries < 2 * settings.sq_entries {
            return Err(self.conflict(&CQ_ENTRIES, "less than twice", &SQ_ENTRIES));
        }
        if settings.receive_queue_bytes < settings.buffer_bytes as usize {
            return Err(self.conflict(&RECEIVE_QUEUE_BYTES, "less than", &BUFFER_BYTES));
        }
        Ok(settings)
    }

    /// The addresses of `SLIPRING_LISTEN`, for a program that lets its user choose them.
    ///
    /// The library does not bind them on its own. Their syntax is checked by
    /// [`from_env`](Config::from_env) and [`validate`](Config::validate).
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let config = Config::default().listen("127.0.0.1:7000, unix:/run/echo.sock");
    /// assert_eq!(config.listen_addresses(), ["127.0.0.1:7000", "unix:/run/echo.sock"]);
    /// ```
    #[must_use]
    pub fn listen_addresses(&self) -> Vec<String> {
        form::items(&self.lookup(&LISTEN).0).map(str::to_owned).collect()
    }

    /// The CPUs of `SLIPRING_CPUS` in the order given; `None` is `auto`.
    pub(crate) fn cpu_list(&self) -> Result<Option<Vec<u16>>> {
        form::cpus(&self.lookup(&CPUS).0).map_err(|reason| self.refuse(&CPUS, reason))
    }

    /// How a program should print its reports; the default is [`ReportFormat::Text`].
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::{Config, ReportFormat};
    ///
    /// assert_eq!(Config::default().report_format(), ReportFormat::Text);
    /// ```
    #[must_use]
    pub fn report_format(&self) -> ReportFormat {
        // invariant: the environment's word was checked, and the setter takes no other.
        ReportFormat::read(&self.lookup(&REPORT).0).unwrap_or_default()
    }

    /// The table of the variables for the README, one row each.
    #[doc(hidden)]
    #[must_use]
    pub fn table_markdown() -> String {
        let mut table = String::from("| variable | default | bounds | what it does |\n");
        table.push_str("|---|---|---|---|\n");
        for variable in VARIABLES {
            let Variable { name, default, bounds, doc, .. } = variable;
            let (default, doc) = (default(), doc.trim());
            table.push_str(&format!("| `{name}` | `{default}` | {bounds} | {doc} |\n"));
        }
        table
    }

    /// A variable's text and its source.
    fn lookup(&self, variable: &Variable) -> (Cow<'_, str>, Source) {
        match self.given.get(variable.name) {
            Some(given) => (Cow::Borrowed(&given.text), given.source),
            None => (Cow::Owned((variable.default)()), Source::Default),
        }
    }

    fn set(mut self, variable: &Variable, text: String, source: Source) -> Config {
        self.given.insert(variable.name, Given { text, source });
        self
    }

    fn check(&self, variable: &Variable) -> Result<()> {
        let (text, _) = self.lookup(variable);
        variable.form.check(&text).map_err(|reason| self.refuse(variable, reason))
    }

    /// A plain variable's value in its type; fails only where `check` was left out.
    fn read<T: Plain>(&self, variable: &Variable) -> Result<T> {
        let (text, _) = self.lookup(variable);
        T::read(&text).ok_or_else(|| self.refuse(variable, "does not fit its type"))
    }

    fn refuse(&self, variable: &Variable, reason: impl fmt::Display) -> Error {
        Error::new(ErrorKind::Config, self.quote(variable))
            .because(format!("{reason}; expected {}", variable.bounds))
    }

    fn conflict(&self, variable: &Variable, relation: &str, other: &Variable) -> Error {
        Error::new(ErrorKind::Config, self.quote(variable))
            .because(format!("{relation} {}", self.quote(other)))
    }

    /// `SLIPRING_IDLE_MS="0" (environment)`, with a long value cut short.
    fn quote(&self, variable: &Variable) -> String {
        let (text, source) = self.lookup(variable);
        format!("{}={} ({source})", variable.name, form::quoted(&text))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Default => "default",
            Source::Environment => "environment",
            Source::Code => "code",
        })
    }
}

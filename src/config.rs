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

pub use self::choices::{Balance, HalfClose, Overload, ReportFormat};
pub use self::explain::Explanation;

mod choices;
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
        /// the cgroup's CPU quota. With `SLIPRING_PIN=0` only their number counts.
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

        /// Large receive buffers of a core, for connections that receive in bulk, and as many more
        /// for datagrams where it has UDP sockets. Their memory is only used once they are.
        LARGE_BUFFERS large_buffers: u32 = 64, [buffers: power of two, 2..=16_384];

        /// Size of a large receive buffer, and the longest datagram that is received whole; there
        /// are none for connections where it is not above `SLIPRING_BUFFER_BYTES`.
        LARGE_BUFFER_BYTES large_buffer_bytes: u32 = 65_536,
            [bytes: multiple of 64, 256..=8_388_608];

        /// Connections that may wait in a listener's queue; the kernel caps it at
        /// `net.core.somaxconn`.
        BACKLOG backlog: u32 = 4_096, [connections: 1..=65_535];

        /// Connections of the whole process, outbound ones included; one core has at most half more
        /// than its share, and one that waits at an address keeps a place for the next there.
        CONNECTIONS_MAX connections_max: usize = 10_000, [connections: 1..=4_000_000];

        /// Connections of one IPv4 address, or one IPv6 network of 64 bits, over all cores; more
        /// are closed as soon as they are accepted.
        CONNECTIONS_PER_IP_MAX connections_per_ip_max: u32 = 0,
            [connections: 0 = off, 1..=4_000_000];

        /// Share of the connections' limit, or of a core's memory, from which on connections are
        /// closed to make room: those that linger, then those that have been idle for longest, none
        /// that was active in the last second. It goes on until 5 % less are in use.
        EVICT_PERCENT evict_percent: u32 = 95, [percent: 0 = off, 10..=100];

        /// Bytes that all connections of a core may have queued in both directions; above it
        /// receives pause and `send` waits, until an eighth of it is free.
        MEMORY_BYTES_MAX memory_bytes_max: usize = 268_435_456,
            [bytes: 65_536..=1_099_511_627_776];

        /// What becomes of a connection for which there is no place: it waits in the listener's
        /// queue, or it is accepted and closed.
        OVERLOAD overload: Overload = Overload::Queue, [queue | reject];

        /// How new connections are spread over the cores: by the kernel's hash of the addresses; to
        /// the core on the CPU that got the handshake, for cores that are pinned; or to the core
        /// with the least connections, by moving those that another one has accepted.
        BALANCE balance: Balance = Balance::Hash, [hash | cpu | least];

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

        /// Longest time that an outbound connection may take to be established, from the name's
        /// resolution to the last of its addresses.
        CONNECT_MS connect_ms: u64 = 10_000, [milliseconds: 1..=3_600_000];

        /// Longest time from accept to the first byte received.
        FIRST_BYTE_MS first_byte_ms: u64 = 10_000, [milliseconds: 1..=3_600_000];

        /// Longest time from a message's first byte to its end, however its bytes are spread.
        MESSAGE_MS message_ms: u64 = 30_000, [milliseconds: 1..=86_400_000];

        /// Longest time without a byte in either direction while a handler waits for input.
        IDLE_MS idle_ms: u64 = 75_000, [milliseconds: 1..=86_400_000];

        /// Longest time without a byte in either direction while a handler does something else.
        HANDLER_MS handler_ms: u64 = 60_000, [milliseconds: 1..=86_400_000];

        /// Longest time that output may wait, here or in the kernel, while the peer takes nothing;
        /// noticed at most a quarter later.
        WRITE_STALL_MS write_stall_ms: u64 = 30_000, [milliseconds: 1..=3_600_000];

        /// Least rate of a message that is being received, and of output as the peer acknowledges
        /// it.
        MIN_RATE_BYTES_PER_S min_rate_bytes_per_s: u64 = 240,
            [bytes: 0 = off, 1..=1_000_000_000];

        /// How long either direction may be slower than `SLIPRING_MIN_RATE_BYTES_PER_S`; noticed
        /// at most a quarter later.
        MIN_RATE_GRACE_MS min_rate_grace_ms: u64 = 5_000, [milliseconds: 1..=3_600_000];

        /// What a peer's end of its side means while the handler is busy: `finish` lets the handler
        /// go on, `abort` ends the connection.
        HALF_CLOSE half_close: HalfClose = HalfClose::Finish, [finish | abort];

        /// Longest time that a handler goes on without a byte sent after the peer has ended its
        /// side.
        HALF_CLOSE_MS half_close_ms: u64 = 30_000, [milliseconds: 1..=86_400_000];

        /// Greatest age of a connection, for each up to a tenth less, so that not all end at once;
        /// one that is busy then has `SLIPRING_DRAIN_MS` to finish.
        LIFETIME_MS lifetime_ms: u64 = 86_400_000, [milliseconds: 1..=31_536_000_000];

        /// Silence of a peer after which it is asked for a sign of life, for each up to a tenth
        /// more or less; for addresses with a frame to ask with.
        HEARTBEAT_MS heartbeat_ms: u64 = 0, [milliseconds: 0 = off, 1..=86_400_000];

        /// How long a peer that was asked for a sign of life may give none.
        HEARTBEAT_TIMEOUT_MS heartbeat_timeout_ms: u64 = 5_000, [milliseconds: 1..=3_600_000];

        /// How long unread input is read and thrown away after our FIN, so that the peer gets the
        /// last response and no reset; longer while the peer takes output that is left, no slower
        /// than `SLIPRING_MIN_RATE_BYTES_PER_S`.
        LINGER_MS linger_ms: u64 = 2_000, [milliseconds: 0 = off, 1..=60_000];

        /// The most unread input that is thrown away so; a peer that sends more is reset.
        LINGER_BYTES linger_bytes: u64 = 1_048_576, [bytes: 0..=1_073_741_824];

        /// Bytes received and not yet taken by the handler above which a connection's receive is
        /// paused; at least `SLIPRING_BUFFER_BYTES`.
        RECEIVE_QUEUE_BYTES receive_queue_bytes: usize = 131_072, [bytes: 256..=67_108_864];

        /// Bytes of a connection accepted by `send` and `write` and not yet in the kernel above
        /// which `send` waits.
        SEND_QUEUE_BYTES send_queue_bytes: usize = 262_144, [bytes: 1_024..=268_435_456];

        /// Connections accepted in one turn of a core.
        ACCEPT_BUDGET accept_budget: u32 = 64, [connections: 1..=65_536];

        /// Task polls in one turn of a core.
        TASK_BUDGET task_budget: u32 = 256, [polls: 1..=65_536];

        /// Deadlines handled in one turn of a core; of those that end a connection, 16 at most.
        EXPIRY_BUDGET expiry_budget: u32 = 256, [deadlines: 1..=65_536];

        /// Completions handled in one turn of a core; to end a connection counts for 16.
        COMPLETION_BUDGET completion_budget: u32 = 1_024, [completions: 16..=65_536];

        /// How long a core that has nothing to do looks out for news before it blocks, while recent
        /// gaps say that it pays, and at most a twentieth of its time in vain. Not on shared CPUs,
        /// nor under a cgroup's CPU quota.
        SPIN_US spin_us: u32 = 0, [microseconds: 0 = off, 1..=1_000];

        /// Whether cores also spin where they share their CPUs with others or have a CPU quota.
        SPIN_SHARED spin_shared: bool = false, [0 | 1];

        /// Tasks of a core, the connections' handlers included.
        TASKS_MAX tasks_max: usize = 1_000_000, [tasks: 1..=16_000_000];

        /// How long a drain goes on accepting after it has reported not ready.
        LAMEDUCK_MS lameduck_ms: u64 = 0, [milliseconds: 0..=3_600_000];

        /// A drain's deadline where the caller names none, as on a signal.
        DRAIN_MS drain_ms: u64 = 25_000, [milliseconds: 1..=3_600_000];

        /// How long a drain keeps a connection that has not sent a byte.
        NEW_GRACE_MS new_grace_ms: u64 = 1_000, [milliseconds: 0..=60_000];

        /// Time over which a drain spreads its closes of idle connections, so that their peers do
        /// not all come back at once. The last of them come before seven eighths of the deadline.
        CLOSE_SPREAD_MS close_spread_ms: u64 = 0, [milliseconds: 0 = off, 1..=3_600_000];

        /// How long after its last byte a drain keeps an idle connection, so that a request that is
        /// on its way is served; not beyond seven eighths of the deadline.
        IDLE_MIN_KEEP_MS idle_min_keep_ms: u64 = 0, [milliseconds: 0 = off, 1..=3_600_000];

        /// How long a drain holds off new handshakes before it empties and closes the listeners,
        /// which takes `CAP_NET_ADMIN`; 0 leaves the listeners as they are.
        SYN_QUIESCE_MS syn_quiesce_ms: u64 = 10, [milliseconds: 0 = off, 1..=1_000];

        /// How long a handler whose connection was ended has to notice, before its future is
        /// dropped. In a drain it lies before the deadline and takes at most a tenth of it.
        FORCE_GRACE_MS force_grace_ms: u64 = 100, [milliseconds: 0..=10_000];

        /// How long a bind is retried while a predecessor still holds the address.
        BIND_RETRY_MS bind_retry_ms: u64 = 1_000, [milliseconds: 0..=60_000];

        /// Time between two self-checks of a core: walks over its connections that also count them
        /// by state and age for `stats`. There are none while it has no connections.
        CHECK_MS check_ms: u64 = 10_000, [milliseconds: 0 = off, 10..=86_400_000];

        /// How long a poll of a task, or a turn of a core, may take before it counts as a stall.
        STALL_MS stall_ms: u64 = 100, [milliseconds: 0 = off, 20..=60_000];

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
    /// - `SLIPRING_MEMORY_BYTES_MAX` is less than `SLIPRING_SEND_QUEUE_BYTES`.
    /// - `SLIPRING_BALANCE` is `cpu` and `SLIPRING_PIN` is `0`.
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
        if settings.memory_bytes_max < settings.send_queue_bytes {
            return Err(self.conflict(&MEMORY_BYTES_MAX, "less than", &SEND_QUEUE_BYTES));
        }
        if settings.balance == Balance::Cpu && settings.pin == Some(false) {
            return Err(self.conflict(&BALANCE, "needs cores that are pinned, unlike", &PIN));
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

//! The variables whose values are words.

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

/// What happens when a peer ends its side while the handler is busy: the value of
/// `SLIPRING_HALF_CLOSE`.
///
/// # Examples
///
/// ```
/// use slipring::{Config, HalfClose};
///
/// // For a protocol in which a peer that has ended its side does not want the answer.
/// let config = Config::default().half_close(HalfClose::Abort);
/// # config.validate()?;
/// # Ok::<(), slipring::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HalfClose {
    /// The handler goes on, and its answer is sent; the default.
    #[default]
    Finish,
    /// The connection is ended.
    Abort,
}

/// What becomes of a connection for which there is no place: the value of `SLIPRING_OVERLOAD`.
///
/// # Examples
///
/// ```
/// use slipring::{Config, Overload};
///
/// let config = Config::default().connections_max(1_000).overload(Overload::Reject);
/// # config.validate()?;
/// # Ok::<(), slipring::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Overload {
    /// It waits in the listener's queue until another one ends, the default. When the queue is full
    /// its client gets no answer and tries again by itself, a second later at first.
    #[default]
    Queue,
    /// It is accepted and closed with a FIN, so that its client can go elsewhere at once.
    Reject,
}

/// How new connections are spread over the cores: the value of `SLIPRING_BALANCE`.
///
/// # Examples
///
/// ```
/// use slipring::{Balance, Config};
///
/// // For few connections that stay for hours.
/// let config = Config::default().balance(Balance::Least);
/// # config.validate()?;
/// # Ok::<(), slipring::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Balance {
    /// The kernel chooses among the cores' listeners by a hash of the addresses, the default. It
    /// costs nothing and is even for many connections. Of a few, one core may get twice its share,
    /// and keeps them as long as they stay.
    #[default]
    Hash,
    /// The kernel takes the listener of the core on the CPU that gets the handshake, so that a
    /// connection stays on the CPU to which the network card brings it. What comes by a CPU without
    /// a core is left to the hash. A client on the same machine is bound to the core of the CPU it
    /// runs on. For TCP; the cores must be pinned, or the start fails.
    Cpu,
    /// A core that has accepted a connection while another one has fewer moves it there: to the one
    /// with the fewest, or among more than nine cores to the better of two that are drawn by lot. A
    /// core whose handlers take all of its time gets none while others have some left. A move costs
    /// a message, and waking the core if it sleeps, which shows where connections are short and few
    /// at a time. Nobody is moved in a drain.
    Least,
}

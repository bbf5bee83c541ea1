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

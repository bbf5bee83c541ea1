//! One error type: what failed, on what, why, and what to do about it.

use std::borrow::Cow;
use std::fmt;
use std::io;

/// The result of everything in slipring that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the runtime, a connection or the configuration.
///
/// [`Error::kind`] is for code, `Display` for people: it names the operation and the thing it was
/// done to, the cause, and where one is known the remedy.
///
/// # Examples
///
/// ```
/// use slipring::{Config, ErrorKind};
///
/// let error = Config::default().idle_ms(0).validate().unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Config);
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    detail: Option<Cow<'static, str>>,
    source: Option<io::Error>,
}

/// What class of failure an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A variable or a setter got a value that is malformed, unknown or out of bounds.
    Config,
    /// The address is taken by somebody who listens on it.
    AddressInUse,
    /// The kernel, a sandbox or a privilege stands in the way; the message says which.
    Unsupported,
    /// A limit of the process or the machine was reached: descriptors, locked memory, threads.
    Resource,
    /// Nobody listens at the address that was to be connected to.
    Refused,
    /// There is no way to the address that was to be connected to, or nobody has it.
    Unreachable,
    /// The peer reset the connection.
    PeerReset,
    /// The peer has vanished: it answered neither data nor keepalive probes.
    PeerDead,
    /// A deadline of the connection passed; the message names the deadline.
    TimedOut,
    /// The peer ended the stream before the bytes asked for had come.
    UnexpectedEof,
    /// The peer broke a protocol that is spoken on the connection, such as HTTP or TLS.
    Protocol,
    /// A bound given by the caller or the configuration was exceeded, such as a line's length.
    TooLong,
    /// The connection, the core or the server has already ended.
    Closed,
    /// The drain reached its force phase and ended the operation.
    Forced,
    /// A task or a core panicked.
    Panicked,
    /// The call is not possible here, such as a blocking drain from one of the cores.
    Misuse,
    /// The program's own part has failed, such as a service that HTTP was served with.
    Service,
    /// Any other error of the operating system; [`source`](std::error::Error::source) has it.
    Io,
}

impl Error {
    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was being done, and to what: `bind 0.0.0.0:80`.
    #[must_use]
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// The operating system's error number, where one is the cause.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }

    pub(crate) fn new(kind: ErrorKind, operation: impl Into<Cow<'static, str>>) -> Error {
        Error(Box::new(Inner { kind, operation: operation.into(), detail: None, source: None }))
    }

    /// Wraps an error of the operating system; its kind follows from the error number.
    pub(crate) fn os(operation: impl Into<Cow<'static, str>>, source: io::Error) -> Error {
        let kind = match source.raw_os_error() {
            Some(libc::EADDRINUSE) => ErrorKind::AddressInUse,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) => ErrorKind::Resource,
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EOPNOTSUPP) => {
                ErrorKind::Unsupported
            }
            Some(libc::ECONNREFUSED) => ErrorKind::Refused,
            Some(libc::ECONNRESET | libc::EPIPE) => ErrorKind::PeerReset,
            Some(libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH) => ErrorKind::PeerDead,
            _ => ErrorKind::Io,
        };
        let mut error = Error::new(kind, operation);
        error.0.source = Some(source);
        error
    }

    /// Replaces the kind, where the operation knows better than the error number.
    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Error {
        self.0.kind = kind;
        self
    }

    /// Says instead what was being done.
    pub(crate) fn during(mut self, operation: impl Into<Cow<'static, str>>) -> Error {
        self.0.operation = operation.into();
        self
    }

    /// Adds the cause and the remedy.
    pub(crate) fn because(mut self, detail: impl Into<Cow<'static, str>>) -> Error {
        self.0.detail = Some(detail.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.operation)?;
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        if let Some(detail) = &self.0.detail {
            write!(f, ": {detail}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self})", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match error.kind() {
            ErrorKind::Config | ErrorKind::Misuse => io::ErrorKind::InvalidInput,
            ErrorKind::AddressInUse => io::ErrorKind::AddrInUse,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::Refused => io::ErrorKind::ConnectionRefused,
            ErrorKind::Unreachable => io::ErrorKind::HostUnreachable,
            ErrorKind::PeerReset => io::ErrorKind::ConnectionReset,
            ErrorKind::TimedOut | ErrorKind::PeerDead => io::ErrorKind::TimedOut,
            ErrorKind::UnexpectedEof => io::ErrorKind::UnexpectedEof,
            ErrorKind::TooLong | ErrorKind::Protocol => io::ErrorKind::InvalidData,
            ErrorKind::Closed => io::ErrorKind::NotConnected,
            ErrorKind::Forced => io::ErrorKind::ConnectionAborted,
            ErrorKind::Resource | ErrorKind::Panicked | ErrorKind::Service | ErrorKind::Io => {
                error.0.source.as_ref().map_or(io::ErrorKind::Other, io::Error::kind)
            }
        };
        io::Error::new(kind, error)
    }
}

impl From<io::Error> for Error {
    /// An error of a handler's own I/O, so that `?` works on files and foreign sockets too. One
    /// that was made from an [`Error`], as the traits of others want it, is that one again.
    fn from(source: io::Error) -> Error {
        let source = match source.downcast::<Error>() {
            Ok(error) => return error,
            Err(source) => source,
        };
        let kind = match source.kind() {
            // One of a trait's own, such as that of tokio's `read_exact`, has no error number.
            io::ErrorKind::UnexpectedEof => Some(ErrorKind::UnexpectedEof),
            io::ErrorKind::TimedOut if source.raw_os_error().is_none() => Some(ErrorKind::TimedOut),
            _ => None,
        };
        let error = Error::os("handler's i/o", source);
        match kind {
            Some(kind) => error.with_kind(kind),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_operation_cause_and_remedy() {
        let error = Error::os("bind 0.0.0.0:80", io::Error::from_raw_os_error(libc::EACCES))
            .because("ports below 1024 need CAP_NET_BIND_SERVICE");
        let text = error.to_string();
        assert!(text.starts_with("bind 0.0.0.0:80: "), "{text}");
        assert!(text.ends_with("CAP_NET_BIND_SERVICE"), "{text}");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn conversion_to_io_error_keeps_the_kind() {
        let reset = Error::os("recv", io::Error::from_raw_os_error(libc::ECONNRESET));
        assert_eq!(io::Error::from(reset).kind(), io::ErrorKind::ConnectionReset);
        let late = Error::new(ErrorKind::TimedOut, "recv");
        assert_eq!(io::Error::from(late).kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn an_error_comes_back_from_an_io_error_as_it_was() {
        let forced = Error::new(ErrorKind::Forced, "recv").because("the drain's deadline has come");
        let text = forced.to_string();
        let again = Error::from(io::Error::from(forced));
        assert_eq!((again.kind(), again.to_string()), (ErrorKind::Forced, text));
        let foreign = Error::from(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!((foreign.kind(), foreign.raw_os_error()), (ErrorKind::Io, Some(libc::ENOENT)));
        let foreign = Error::from(io::Error::from(io::ErrorKind::UnexpectedEof));
        assert_eq!(foreign.kind(), ErrorKind::UnexpectedEof);
    }
}

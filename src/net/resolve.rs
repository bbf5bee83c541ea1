//! From a host's name to its addresses. getaddrinfo(3) blocks, so it never runs on a core.

use std::net::SocketAddr;

use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "blocking")]
use crate::offload::leave_the_cores_cpu;

/// All addresses of `host:port`, in the order of getaddrinfo(3) (RFC 6724).
///
/// Dropped early, it leaves the thread that asks to its end, and nobody hears of what it finds.
#[cfg(feature = "blocking")]
pub(super) async fn resolve(name: String) -> Result<Vec<SocketAddr>> {
    use std::net::ToSocketAddrs;

    let asked = name.clone();
    let look_up = move || {
        leave_the_cores_cpu();
        asked.to_socket_addrs().map(Iterator::collect)
    };
    let found: Vec<_> = blocking::unblock(look_up).await.map_err(|error| {
        // What is not the system's answer is that of the lookup: EAI_NONAME, EAI_AGAIN.
        let nowhere = error.raw_os_error().is_none();
        let error = Error::os(format!("resolve {name}"), error);
        if nowhere { error.with_kind(ErrorKind::Unreachable) } else { error }
    })?;
    if found.is_empty() {
        let error = Error::new(ErrorKind::Unreachable, format!("resolve {name}"));
        return Err(error.because("the name has no address"));
    }
    Ok(found)
}

/// Without a thread to wait on there is no answer.
#[cfg(not(feature = "blocking"))]
pub(super) async fn resolve(name: String) -> Result<Vec<SocketAddr>> {
    Err(Error::new(ErrorKind::Unsupported, format!("resolve {name}")).because(
        "names are looked up on a pool of threads, which takes the feature `blocking`; enable it, \
         or resolve the name beforehand and pass its addresses to `net::connect_any`",
    ))
}

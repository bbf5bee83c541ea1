//! The socket calls that std and socket2 lack, on borrowed descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Takes one connection from a listener's queue without waiting (`accept4(2)`).
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: both pointers may be null when the peer's address is not wanted.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), address, length, libc::SOCK_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has a bind to port 0 choose the address only, and leave the port to the connect: then two
/// connections to different peers may have the same one (`IP_BIND_ADDRESS_NO_PORT`, ip(7), also
/// for IPv6).
pub(crate) fn bind_address_only(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int, which outlives the call and whose size is passed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many bytes are received and unread (`FIONREAD`, tcp(7)).
pub(crate) fn unread_bytes(socket: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}

/// How many bytes the kernel holds that the peer has not taken (`SIOCOUTQ`, unix(7), tcp(7)).
pub(crate) fn unsent_bytes(socket: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ, writes one int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    if result < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}

/// Reads and throws away what has come, no more than `most` bytes, without a copy (`MSG_TRUNC`,
/// tcp(7)); ends when nothing more is there. Not inlined: whoever it is a part of would touch the
/// pages of its buffer with each call.
#[inline(never)]
pub(crate) fn discard(socket: BorrowedFd<'_>, mut most: usize) {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    while most > 0 {
        // A Unix socket copies all the same, so there is a buffer.
        let mut buf = [0u8; 16_384];
        // SAFETY: a TCP socket writes nothing, any other at most as much as the buffer holds.
        let count =
            unsafe { libc::recv(socket.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), flags) };
        match usize::try_from(count) {
            Ok(count) if count > 0 => most = most.saturating_sub(count),
            _ => return,
        }
    }
}

/// How many datagrams a socket has lost so far for want of room (`SO_MEMINFO`, the field
/// `SK_MEMINFO_DROPS` of linux/sock_diag.h).
pub(crate) fn lost_datagrams(socket: BorrowedFd<'_>) -> Option<u32> {
    let mut info = [0u32; 16];
    let mut bytes = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as it is told that there are.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    (result == 0 && bytes as usize >= (DROPS + 1) * 4).then_some(info[DROPS])
}

/// Sets an option that is a number (`setsockopt(2)`), such as `SO_RXQ_OVFL` or `UDP_GRO`.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: i32,
    option: i32,
    value: i32,
) -> io::Result<()> {
    let bytes = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel reads one int.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), bytes)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// How many connections wait in the queue of a listener: `tcpi_unacked` of its `TCP_INFO`
/// (`tcp_get_info` in the kernel's net/ipv4/tcp.c). `None` for other sockets.
pub(crate) fn queued_connections(listener: BorrowedFd<'_>) -> Option<u64> {
    tcp_info(listener).map(|info| word(&info, UNACKED).into())
}

/// How many bytes the peer of a TCP connection has acknowledged in its life: `tcpi_bytes_acked` of
/// `TCP_INFO` (tcp(7), linux/tcp.h). `None` for other sockets.
pub(crate) fn acknowledged_bytes(socket: BorrowedFd<'_>) -> Option<u64> {
    tcp_info(socket).map(|info| info[BYTES_ACKED])
}

/// Whether a TCP connection is over for the kernel: `tcpi_state` of its `TCP_INFO` is
/// `TCP_CLOSE`. False for other sockets.
pub(crate) fn is_closed(socket: BorrowedFd<'_>) -> bool {
    // The first byte of all.
    tcp_info(socket).is_some_and(|info| info[0].to_ne_bytes()[0] == TCP_CLOSE)
}

/// Whether a TCP connection is over since the peer did not answer: the kernel had sent data again
/// in vain (`tcpi_retransmits`), or asked for room (`tcpi_probes`) and heard nothing for a user
/// timeout (`tcpi_last_ack_recv`, in milliseconds). False for other sockets.
pub(crate) fn is_given_up(socket: BorrowedFd<'_>, user_timeout_ms: u64) -> bool {
    tcp_info(socket).is_some_and(|info| {
        let [state, _, retransmits, probes, ..] = info[0].to_ne_bytes();
        let silent = || user_timeout_ms > 0 && u64::from(word(&info, LAST_ACK)) >= user_timeout_ms;
        state == TCP_CLOSE && (retransmits > 0 || (probes > 0 && silent()))
    })
}

/// One of the numbers of 32 bits in a `struct tcp_info`.
fn word(info: &[u64; 32], at: usize) -> u32 {
    let bytes = info[at / 8].to_ne_bytes();
    let half = if at.is_multiple_of(8) { [0, 1, 2, 3] } else { [4, 5, 6, 7] };
    u32::from_ne_bytes(half.map(|n| bytes[n]))
}

/// As much of `struct tcp_info` as every kernel that we run on has.
fn tcp_info(socket: BorrowedFd<'_>) -> Option<[u64; 32]> {
    let mut info = [0u64; 32];
    let mut bytes = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most as many bytes as it is told that there are.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut bytes,
        )
    };
    (result == 0 && bytes as usize >= (BYTES_ACKED + 1) * 8).then_some(info)
}

/// From asm-generic/socket.h; the crate lacks it.
const SO_MEMINFO: i32 = 55;
/// Where it has the drops, in words of four bytes.
const DROPS: usize = 8;
/// Where `struct tcp_info` has `tcpi_bytes_acked`, in words of eight bytes.
const BYTES_ACKED: usize = 120 / 8;
/// A value of `tcpi_state` (net/tcp_states.h in the kernel's sources).
const TCP_CLOSE: u8 = 7;
/// Where it has `tcpi_unacked` and `tcpi_last_ack_recv`, in bytes.
const UNACKED: usize = 24;
const LAST_ACK: usize = 56;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn acknowledged_bytes_follow_what_the_peer_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let before = acknowledged_bytes(ours.as_fd()).unwrap();
        ours.write_all(&[7; 1000]).unwrap();
        theirs.read_exact(&mut [0; 1000]).unwrap();
        theirs.write_all(b"!").unwrap();
        ours.read_exact(&mut [0]).unwrap();
        let give_up = Instant::now() + Duration::from_secs(5);
        while acknowledged_bytes(ours.as_fd()) != Some(before + 1000) {
            assert!(Instant::now() < give_up, "{:?}", acknowledged_bytes(ours.as_fd()));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn a_listener_tells_how_many_are_queued() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(queued_connections(listener.as_fd()), Some(0));
        let addr = listener.local_addr().unwrap();
        let clients: Vec<_> = (0..7).map(|_| TcpStream::connect(addr).unwrap()).collect();
        assert_eq!(queued_connections(listener.as_fd()), Some(clients.len() as u64));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn unread_input_is_thrown_away_up_to_a_bound() {
        let (mut tcp, (mut unix, our_unix)) = (Vec::new(), UnixStream::pair().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        tcp.push(listener.accept().unwrap().0);
        theirs.write_all(&[7; 50_000]).unwrap();
        unix.write_all(&[7; 50_000]).unwrap();
        let give_up = Instant::now() + Duration::from_secs(5);
        while unread_bytes(tcp[0].as_fd()) < 50_000 {
            assert!(Instant::now() < give_up);
        }
        for ours in [tcp[0].as_fd(), our_unix.as_fd()] {
            discard(ours, 10_000);
            assert!((30_000..=40_000).contains(&unread_bytes(ours)), "{}", unread_bytes(ours));
            discard(ours, 1 << 20);
            assert_eq!(unread_bytes(ours), 0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn a_connection_that_was_reset_is_closed_and_no_other_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        assert!(!is_closed(ours.as_fd()) && !is_closed(listener.as_fd()));
        socket2::SockRef::from(&theirs).set_linger(Some(Duration::ZERO)).unwrap();
        drop(theirs);
        assert!(ours.read(&mut [0]).is_err(), "a reset");
        assert!(is_closed(ours.as_fd()));
        assert!(!is_closed(UnixStream::pair().unwrap().0.as_fd()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn a_unix_socket_tells_what_is_unread() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(acknowledged_bytes(ours.as_fd()), None);
        ours.write_all(&[7; 100]).unwrap();
        assert_eq!(unread_bytes(theirs.as_fd()), 100);
        assert!(unsent_bytes(ours.as_fd()) >= 100);
        theirs.read_exact(&mut [0; 100]).unwrap();
        assert_eq!(unsent_bytes(ours.as_fd()), 0);
    }
}

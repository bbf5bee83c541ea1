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

/// How many bytes the peer of a TCP connection has acknowledged in its life: `tcpi_bytes_acked` of
/// `TCP_INFO` (tcp(7), linux/tcp.h). `None` for other sockets.
pub(crate) fn acknowledged_bytes(socket: BorrowedFd<'_>) -> Option<u64> {
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
    (result == 0 && bytes as usize >= (BYTES_ACKED + 1) * 8).then(|| info[BYTES_ACKED])
}

/// Where `struct tcp_info` has `tcpi_bytes_acked`, in words of eight bytes.
const BYTES_ACKED: usize = 120 / 8;

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

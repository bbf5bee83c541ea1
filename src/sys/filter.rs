//! Classic BPF on listening sockets (bpf in socket(7)): to hold off new handshakes, and to choose
//! which of the sockets of a port gets them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Drops the segments that begin a handshake on a TCP listener, over IPv4 and IPv6 alike.
/// Everything else gets through, so handshakes that are under way complete. Who is held off tries
/// again after a second.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`, on kernels that ask for it.
pub(crate) fn drop_syns(listener: BorrowedFd<'_>) -> io::Result<()> {
    // The filter of a TCP socket sees the segment from the TCP header on.
    let program = [
        load(libc::BPF_B, TCP_FLAGS_OFFSET),
        operation(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, FIN | SYN | RST | ACK),
        jump_if_equal(SYN, 0, 1),
        give(0),
        give(u32::MAX),
    ];
    attach(listener, libc::SO_ATTACH_FILTER, &program)
}

/// Gives the new connections of some CPUs, of those that handle the handshake, to one socket of the
/// listener's port each, and all others to the sockets `among`, to each as many; where that is
/// empty the kernel chooses. The sockets are numbered in the order in which they began to listen;
/// when one is closed, the last takes its number. Established connections are left alone.
///
/// # Errors
/// As `SO_ATTACH_REUSEPORT_CBPF` in socket(7); it needs no privilege.
pub(crate) fn steer(
    listener: BorrowedFd<'_>,
    by_cpu: &[(u16, u32)],
    among: &[u32],
) -> io::Result<()> {
    let mut program = vec![load(libc::BPF_W, (libc::SKF_AD_OFF + libc::SKF_AD_CPU) as u32)];
    for (cpu, index) in by_cpu {
        program.push(jump_if_equal(u32::from(*cpu), 0, 1));
        program.push(give(*index));
    }
    if !among.is_empty() {
        program.push(load(libc::BPF_W, (libc::SKF_AD_OFF + libc::SKF_AD_RANDOM) as u32));
        let count = among.len() as u32;
        program.push(operation(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count));
    }
    for (lot, index) in among.iter().enumerate() {
        program.push(jump_if_equal(lot as u32, 0, 1));
        program.push(give(*index));
    }
    // A number that no socket has leaves the choice to the kernel.
    program.push(give(u32::MAX));
    attach(listener, libc::SO_ATTACH_REUSEPORT_CBPF, &program)
}

/// Leaves the choice to the kernel again.
///
/// # Errors
/// `ENOENT` when nothing was attached.
pub(crate) fn stop_steering(listener: BorrowedFd<'_>) -> io::Result<()> {
    let nothing: libc::c_int = 0;
    set_option(listener, libc::SO_DETACH_REUSEPORT_BPF, &nothing)
}

fn attach(
    listener: BorrowedFd<'_>,
    option: libc::c_int,
    program: &[libc::sock_filter],
) -> io::Result<()> {
    let Ok(len) = u16::try_from(program.len()) else {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    };
    // The kernel only reads the program.
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    set_option(listener, option, &program)
}

fn set_option<T>(listener: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is live and as long as said, and what a program's pointer leads to is live
    // too; the kernel copies both before the call returns.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn load(size: u32, offset: u32) -> libc::sock_filter {
    operation(libc::BPF_LD | libc::BPF_ABS | size, offset)
}

fn give(value: u32) -> libc::sock_filter {
    operation(libc::BPF_RET | libc::BPF_K, value)
}

fn operation(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump_if_equal(value: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    libc::sock_filter { code, jt: then, jf: otherwise, k: value }
}

/// Where the flags stand in a TCP header (RFC 9293), and those that tell what a segment is.
const TCP_FLAGS_OFFSET: u32 = 13;
const FIN: u32 = 0x01;
const SYN: u32 = 0x02;
const RST: u32 = 0x04;
const ACK: u32 = 0x10;

#[cfg(test)]
mod tests;

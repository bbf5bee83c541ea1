//! One datagram between the kernel and us: what it writes before one that it has received, and
//! what it is told of one that it is to send.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr;

use crate::buf::SendBuf;

/// What is known of a received datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) peer: SocketAddr,
    /// The size of each of several datagrams that came as one (`UDP_GRO`, udp(7)).
    pub(crate) segment: Option<usize>,
    /// How many datagrams the socket has lost so far for want of room (`SO_RXQ_OVFL`, socket(7)).
    pub(crate) dropped: Option<u32>,
    /// How long it was, be it that not all of it found room.
    pub(crate) sent_bytes: usize,
}

impl Arrival {
    /// Reads what stands before the payload in a buffer that a multishot `recvmsg` has filled: a
    /// `struct io_uring_recvmsg_out`, then room for the peer's address and for control messages, as
    /// much as was asked for. See `io_uring_prep_recvmsg_multishot(3)`.
    ///
    /// `None` for what no kernel writes, and for a peer that is neither IPv4 nor IPv6.
    pub(crate) fn read(buffer: &[u8]) -> Option<Arrival> {
        let (header, _) = buffer.split_at_checked(HEADER_BYTES)?;
        let word = |n: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[n * 4 + byte]));
        let (name_bytes, control_bytes) = (word(0) as usize, word(1) as usize);
        let name = header[OUT_BYTES..OUT_BYTES + NAME_BYTES].get(..name_bytes)?;
        let controls = header[OUT_BYTES + NAME_BYTES..].get(..control_bytes)?;
        let mut arrival = Arrival {
            peer: read_name(name)?,
            segment: None,
            dropped: None,
            sent_bytes: word(2) as usize,
        };
        for (level, kind, data) in Controls(controls) {
            let value = data.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
            match (level, kind) {
                (libc::SOL_UDP, libc::UDP_GRO) => arrival.segment = value.map(|it| it as usize),
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => arrival.dropped = value,
                _ => {}
            }
        }
        Some(arrival)
    }

    /// Writes what [`Arrival::read`] reads, as the kernel does.
    #[cfg(test)]
    pub(crate) fn write(&self) -> Vec<u8> {
        let (mut name, mut controls) = ([0; NAME_BYTES], Vec::new());
        let name_bytes = write_name(self.peer, &mut name);
        if let Some(dropped) = self.dropped {
            let count = dropped.to_ne_bytes();
            controls.extend(control(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &count));
        }
        if let Some(segment) = self.segment {
            let size = (segment as i32).to_ne_bytes();
            controls.extend(control(libc::SOL_UDP, libc::UDP_GRO, &size));
        }
        let words = [name_bytes, controls.len(), self.sent_bytes, 0];
        let mut header: Vec<u8> = words.iter().flat_map(|n| (*n as u32).to_ne_bytes()).collect();
        header.extend(name);
        header.extend(&controls);
        header.resize(HEADER_BYTES, 0);
        header
    }
}

/// What a multishot `recvmsg` asks for: the peer's address, and the control messages above.
pub(super) fn receive_header() -> libc::msghdr {
    let mut header = no_header();
    header.msg_namelen = NAME_BYTES as libc::socklen_t;
    header.msg_controllen = CONTROL_BYTES as _;
    header
}

/// A buffer to be sent as one datagram, or cut into several of one size. The driver owns it until
/// the kernel has answered, so no byte of it moves or is freed before.
pub(crate) struct Outgoing {
    buf: SendBuf,
    /// How much of it is sent.
    sent: usize,
    /// How many bytes go into each datagram.
    segment: usize,
    /// Whether the kernel cuts (`UDP_SEGMENT`, udp(7)), rather than get one datagram each time.
    cuts: bool,
    peer: Option<SocketAddr>,
    name: [u8; NAME_BYTES],
    control: Control,
    piece: libc::iovec,
    header: libc::msghdr,
}

/// Room for one control message, aligned as the kernel wants it.
#[repr(align(8))]
struct Control([u8; CONTROL_SPACE]);

impl Outgoing {
    pub(crate) fn new() -> Outgoing {
        Outgoing {
            buf: SendBuf::from(""),
            sent: 0,
            segment: 0,
            cuts: false,
            peer: None,
            name: [0; NAME_BYTES],
            control: Control([0; CONTROL_SPACE]),
            piece: libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 },
            header: no_header(),
        }
    }

    /// Takes a buffer over, for one datagram or for several of `segment` bytes; the last one may be
    /// shorter. Without a peer it goes to the one that the socket is connected to.
    pub(crate) fn fill(
        &mut self,
        buf: SendBuf,
        segment: Option<usize>,
        peer: Option<SocketAddr>,
        cuts: bool,
    ) {
        self.segment = segment.unwrap_or(buf.len()).max(1);
        (self.buf, self.sent, self.peer, self.cuts) = (buf, 0, peer, cuts);
    }

    /// Lets the buffer go.
    pub(crate) fn clear(&mut self) {
        self.buf = SendBuf::from("");
    }

    pub(crate) fn bytes(&self) -> usize {
        self.buf.len()
    }

    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.peer
    }

    /// What goes out next.
    pub(crate) fn next(&self) -> &[u8] {
        let rest = &self.buf[self.sent..];
        let most = if self.cuts {
            self.segment * (PAYLOAD_MAX_V4 / self.segment).clamp(1, SEGMENTS_MAX)
        } else {
            self.segment
        };
        &rest[..rest.len().min(most)]
    }

    /// How many datagrams that makes.
    pub(crate) fn next_datagrams(&self) -> u64 {
        self.next().len().div_ceil(self.segment).max(1) as u64
    }

    /// Whether the kernel is asked to cut it.
    pub(crate) fn is_cut(&self) -> bool {
        self.next().len() > self.segment
    }

    /// From here on each datagram goes out by itself.
    pub(crate) fn cut_here(&mut self) {
        self.cuts = false;
    }

    /// What was next is sent. True if more is to be.
    pub(crate) fn advance(&mut self) -> bool {
        self.sent += self.next().len();
        self.sent < self.buf.len()
    }

    /// How many datagrams are not sent.
    pub(crate) fn unsent_datagrams(&self) -> u64 {
        (self.buf.len() - self.sent).div_ceil(self.segment).max(1) as u64
    }

    /// How many bytes each datagram has.
    #[cfg(test)]
    pub(crate) fn segment(&self) -> usize {
        self.segment
    }

    /// Fills in the header for `sendmsg(2)` and returns its address, which holds until this is next
    /// touched or moved.
    pub(super) fn header(&mut self) -> *const libc::msghdr {
        let next = self.next();
        // The kernel only reads through it.
        let (base, len) = (next.as_ptr().cast_mut().cast(), next.len());
        self.piece = libc::iovec { iov_base: base, iov_len: len };
        self.header = no_header();
        self.header.msg_iov = &raw mut self.piece;
        self.header.msg_iovlen = 1;
        if let Some(peer) = self.peer {
            self.header.msg_namelen = write_name(peer, &mut self.name) as libc::socklen_t;
            self.header.msg_name = self.name.as_mut_ptr().cast();
        }
        if self.is_cut() {
            let size = (self.segment as u16).to_ne_bytes();
            self.control = Control(control(libc::SOL_UDP, libc::UDP_SEGMENT, &size));
            self.header.msg_controllen = CONTROL_SPACE as _;
            self.header.msg_control = self.control.0.as_mut_ptr().cast();
        }
        ptr::from_ref(&self.header)
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outgoing({} of {} bytes sent)", self.sent, self.buf.len())
    }
}

fn no_header() -> libc::msghdr {
    // SAFETY: a msghdr is plain integers and pointers, for which zero is a valid value.
    unsafe { std::mem::zeroed() }
}

/// A `struct sockaddr_in` or `sockaddr_in6` as an address (ip(7), ipv6(7)).
fn read_name(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
    match i32::from(family) {
        libc::AF_INET => {
            let ip: [u8; 4] = *name.get(4..)?.first_chunk()?;
            Some(SocketAddrV4::new(Ipv4Addr::from(ip), port).into())
        }
        libc::AF_INET6 => {
            let flow = u32::from_be_bytes(*name.get(4..)?.first_chunk()?);
            let ip: [u8; 16] = *name.get(8..)?.first_chunk()?;
            let scope = u32::from_ne_bytes(*name.get(24..)?.first_chunk()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, flow, scope).into())
        }
        _ => None,
    }
}

/// The reverse of [`read_name`]; returns how long it is.
fn write_name(addr: SocketAddr, name: &mut [u8; NAME_BYTES]) -> usize {
    name.fill(0);
    name[2..4].copy_from_slice(&addr.port().to_be_bytes());
    let (family, bytes) = match addr {
        SocketAddr::V4(addr) => {
            name[4..8].copy_from_slice(&addr.ip().octets());
            (libc::AF_INET, size_of::<libc::sockaddr_in>())
        }
        SocketAddr::V6(addr) => {
            name[4..8].copy_from_slice(&addr.flowinfo().to_be_bytes());
            name[8..24].copy_from_slice(&addr.ip().octets());
            name[24..28].copy_from_slice(&addr.scope_id().to_ne_bytes());
            (libc::AF_INET6, size_of::<libc::sockaddr_in6>())
        }
    };
    name[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    bytes
}

/// One control message (cmsg(3)) with no more data than a word.
fn control(level: i32, kind: i32, data: &[u8]) -> [u8; CONTROL_SPACE] {
    let mut message = [0; CONTROL_SPACE];
    let (len, data_at) = (CONTROL_HEAD + data.len(), size_of::<usize>());
    message[..data_at].copy_from_slice(&len.to_ne_bytes());
    message[data_at..data_at + 4].copy_from_slice(&level.to_ne_bytes());
    message[data_at + 4..CONTROL_HEAD].copy_from_slice(&kind.to_ne_bytes());
    message[CONTROL_HEAD..len].copy_from_slice(data);
    message
}

/// A list of control messages, as level, type and data.
struct Controls<'a>(&'a [u8]);

impl<'a> Iterator for Controls<'a> {
    type Item = (i32, i32, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, level_at) = (self.0.get(..CONTROL_HEAD)?, size_of::<usize>());
        let len = usize::from_ne_bytes(*head.first_chunk()?);
        let level = i32::from_ne_bytes(*head[level_at..].first_chunk()?);
        let kind = i32::from_ne_bytes(*head[level_at + 4..].first_chunk()?);
        let data = self.0.get(CONTROL_HEAD..len)?;
        self.0 = self.0.get(len.next_multiple_of(size_of::<usize>())..).unwrap_or_default();
        Some((level, kind, data))
    }
}

/// `struct io_uring_recvmsg_out`: how long address, control messages and payload are, and flags.
const OUT_BYTES: usize = 16;
/// Room for an address of either kind, rounded up so that control messages are aligned.
const NAME_BYTES: usize = 32;
const CONTROL_HEAD: usize = size_of::<libc::cmsghdr>();
/// A control message with a word of data, or less.
const CONTROL_SPACE: usize = CONTROL_HEAD + size_of::<usize>();
/// Room for two of them, and so much more that the payload begins on a cache line.
const CONTROL_BYTES: usize = 80;
const _: () = assert!(2 * CONTROL_SPACE <= CONTROL_BYTES && HEADER_BYTES.is_multiple_of(64));
/// What stands before the payload in a receive buffer.
pub(crate) const HEADER_BYTES: usize = OUT_BYTES + NAME_BYTES + CONTROL_BYTES;
const _: () = assert!(CONTROL_HEAD == size_of::<usize>() + 8);
const _: () = assert!(size_of::<libc::sockaddr_in6>() <= NAME_BYTES);

/// The longest payload of a datagram over IPv4: 65 535 less the headers of IP and UDP (RFC 768).
pub(crate) const PAYLOAD_MAX_V4: usize = 65_535 - 20 - 8;
/// Over IPv6 the header of IP does not count (RFC 8200).
pub(crate) const PAYLOAD_MAX_V6: usize = 65_535 - 8;
/// The kernel cuts one send into no more datagrams than this (`UDP_MAX_SEGMENTS`, linux/udp.h).
const SEGMENTS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs() -> [SocketAddr; 3] {
        let scoped = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 53, 7, 3).into();
        ["192.0.2.7:4660".parse().unwrap(), "[2001:db8::1]:65535".parse().unwrap(), scoped]
    }

    #[test]
    fn what_stands_before_a_payload_is_read_as_it_was_written() {
        for peer in addrs() {
            for segment in [None, Some(1200)] {
                for dropped in [None, Some(u32::MAX)] {
                    let arrival = Arrival { peer, segment, dropped, sent_bytes: 70_000 };
                    let mut buffer = arrival.write();
                    assert_eq!(buffer.len(), HEADER_BYTES);
                    buffer.extend(b"payload");
                    assert_eq!(Arrival::read(&buffer), Some(arrival));
                }
            }
        }
    }

    #[test]
    fn what_no_kernel_writes_is_refused_and_never_a_panic() {
        let peer = addrs()[0];
        let arrival = Arrival { peer, segment: Some(9), dropped: Some(1), sent_bytes: 3 };
        let good = arrival.write();
        assert_eq!(Arrival::read(&good[..HEADER_BYTES - 1]), None);
        for byte in 0..HEADER_BYTES {
            for value in [0, 1, 15, 17, 127, 255] {
                let mut bad = good.clone();
                bad[byte] = value;
                if let Some(read) = Arrival::read(&bad) {
                    assert!(read.peer.is_ipv4() || byte < 2 || read.peer.is_ipv6());
                }
            }
        }
        let mut foreign = good.clone();
        foreign[OUT_BYTES] = libc::AF_UNIX as u8;
        assert_eq!(Arrival::read(&foreign), None);
    }

    /// Any buffer leaves as datagrams of its size, whoever cuts, and in turns that a kernel takes.
    #[test]
    fn a_buffer_is_cut_into_datagrams_of_one_size_and_a_rest() {
        for (len, segment) in
            [(0usize, 9), (9, 9), (10, 9), (100_000, 1200), (200_000, 65_507), (7, 1)]
        {
            for cuts in [true, false] {
                let bytes: Vec<u8> = (0..len).map(|n| n as u8).collect();
                let mut outgoing = Outgoing::new();
                outgoing.fill(bytes.clone().into(), Some(segment), None, cuts);
                assert_eq!(outgoing.unsent_datagrams(), len.div_ceil(segment).max(1) as u64);
                let (mut sent, mut datagrams) = (Vec::new(), 0);
                loop {
                    let next = outgoing.next();
                    assert!(next.len() <= PAYLOAD_MAX_V4);
                    assert!(next.len() <= segment || cuts);
                    sent.extend(next);
                    datagrams += outgoing.next_datagrams();
                    assert!(outgoing.next_datagrams() <= SEGMENTS_MAX as u64);
                    if !outgoing.advance() {
                        break;
                    }
                }
                assert_eq!((sent, datagrams), (bytes, len.div_ceil(segment).max(1) as u64));
            }
        }
    }

    #[test]
    fn a_header_names_the_peer_the_bytes_and_the_size() {
        let mut outgoing = Outgoing::new();
        outgoing.fill("some bytes".into(), Some(4), Some(addrs()[1]), true);
        outgoing.header();
        assert_eq!(read_name(&outgoing.name), Some(addrs()[1]));
        assert_eq!((outgoing.piece.iov_len, outgoing.header.msg_iovlen), (10, 1));
        let control = Controls(&outgoing.control.0).next();
        assert_eq!(control, Some((libc::SOL_UDP, libc::UDP_SEGMENT, &[4, 0][..])));
        outgoing.cut_here();
        outgoing.header();
        assert_eq!((outgoing.piece.iov_len, outgoing.header.msg_controllen), (4, 0));
    }
}

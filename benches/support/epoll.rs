//! The classic: a non-blocking, level-triggered epoll echo loop, as it would be written in C.
//!
//! One `recv` and one `send` per readiness, no second `recv` to see EAGAIN, one `epoll_wait` per
//! batch. What a full socket does not take is kept, and reading pauses until it is gone.

use std::{
    io,
    net::TcpListener,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// Echoes on `listener` until `stop` says so, which is asked once per turn; returns the system
/// calls made.
///
/// A wait ends early only by a signal, so `stop` wants one (a handler without `SA_RESTART`).
pub fn serve(listener: TcpListener, stop: impl Fn() -> bool) -> io::Result<u64> {
    listener.set_nonblocking(true)?;
    // SAFETY: the call takes no pointer.
    let epoll = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: the call above made this fd, and nothing else owns it.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let mut echo = Echo { epoll, connections: Vec::new(), calls: 0 };
    let listening = listener.as_raw_fd();
    echo.control(libc::EPOLL_CTL_ADD, listening, libc::EPOLLIN)?;
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; EVENTS];
    let mut buffer = [0; BUFFER_BYTES];
    while !stop() {
        let ready = echo.wait(&mut events)?;
        for event in &events[..ready] {
            match event.u64 as RawFd {
                fd if fd == listening => echo.accept(fd)?,
                fd if event.events & libc::EPOLLOUT as u32 != 0 => echo.flush(fd)?,
                fd => echo.echo(fd, &mut buffer)?,
            }
        }
    }
    Ok(echo.calls)
}

struct Echo {
    epoll: OwnedFd,
    /// Indexed by fd.
    connections: Vec<Option<Connection>>,
    calls: u64,
}

struct Connection {
    _socket: OwnedFd,
    /// Received, but not taken by the socket yet.
    unsent: Vec<u8>,
}

impl Echo {
    fn wait(&mut self, events: &mut [libc::epoll_event]) -> io::Result<usize> {
        self.calls += 1;
        let (at, room) = (events.as_mut_ptr(), events.len() as i32);
        // SAFETY: the kernel writes at most `room` events to a slice of that length.
        match check(unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), at, room, -1) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
            ready => ready.map(|count| count as usize),
        }
    }

    fn accept(&mut self, listening: RawFd) -> io::Result<()> {
        loop {
            self.calls += 1;
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            // SAFETY: null for the address is allowed and means that it is not wanted.
            let accepted =
                unsafe { libc::accept4(listening, ptr::null_mut(), ptr::null_mut(), flags) };
            let Ok(fd) = check(accepted) else { return Ok(()) };
            // SAFETY: accept made this fd, and nothing else owns it.
            let socket = unsafe { OwnedFd::from_raw_fd(fd) };
            if self.connections.len() <= fd as usize {
                self.connections.resize_with(fd as usize + 1, || None);
            }
            self.connections[fd as usize] =
                Some(Connection { _socket: socket, unsent: Vec::new() });
            self.control(libc::EPOLL_CTL_ADD, fd, libc::EPOLLIN)?;
        }
    }

    fn echo(&mut self, fd: RawFd, buffer: &mut [u8; BUFFER_BYTES]) -> io::Result<()> {
        self.calls += 1;
        // SAFETY: the kernel writes at most the array's length into the array.
        let received = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), BUFFER_BYTES, 0) };
        match received {
            1.. => {}
            0 => return self.close(fd),
            _ if would_block() => return Ok(()),
            _ => return self.close(fd),
        }
        let received = &buffer[..received as usize];
        match self.send(fd, received) {
            Some(sent) if sent == received.len() => Ok(()),
            Some(sent) => {
                let connection = self.connections[fd as usize].as_mut();
                let connection = connection.expect("an event names a connection");
                connection.unsent.extend_from_slice(&received[sent..]);
                self.control(libc::EPOLL_CTL_MOD, fd, libc::EPOLLOUT)
            }
            None => self.close(fd),
        }
    }

    fn flush(&mut self, fd: RawFd) -> io::Result<()> {
        let connection = self.connections[fd as usize].as_mut();
        let mut unsent = std::mem::take(&mut connection.expect("an event names one").unsent);
        let Some(sent) = self.send(fd, &unsent) else { return self.close(fd) };
        unsent.drain(..sent);
        if unsent.is_empty() {
            self.control(libc::EPOLL_CTL_MOD, fd, libc::EPOLLIN)?;
        }
        let connection = self.connections[fd as usize].as_mut();
        connection.expect("it was here above").unsent = unsent;
        Ok(())
    }

    /// How many bytes the socket took; None after an error.
    fn send(&mut self, fd: RawFd, bytes: &[u8]) -> Option<usize> {
        self.calls += 1;
        let (at, flags) = (bytes.as_ptr().cast(), libc::MSG_NOSIGNAL);
        // SAFETY: the kernel reads at most the slice's length from the slice.
        match unsafe { libc::send(fd, at, bytes.len(), flags) } {
            sent @ 0.. => Some(sent as usize),
            _ => would_block().then_some(0),
        }
    }

    /// Closing takes the fd out of the epoll set too.
    fn close(&mut self, fd: RawFd) -> io::Result<()> {
        self.connections[fd as usize] = None;
        Ok(())
    }

    fn control(&mut self, op: i32, fd: RawFd, events: i32) -> io::Result<()> {
        self.calls += 1;
        let mut event = libc::epoll_event { events: events as u32, u64: fd as u64 };
        // SAFETY: the kernel reads one event, which lives on this stack for the whole call.
        check(unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), op, fd, &raw mut event) })?;
        Ok(())
    }
}

fn would_block() -> bool {
    io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const EVENTS: usize = 256;
const BUFFER_BYTES: usize = 4096;

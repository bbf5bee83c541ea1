//! The file of a Unix socket: taken over from a process that is gone, and removed with the server,
//! unless a successor has put its own in its place.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// A bound socket's file; dropping it removes the file if it is still that socket's.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// While it is held, no other file gets its number.
    file: File,
}

impl SocketFile {
    /// Takes hold of the file, right after the socket was bound.
    pub(crate) fn of(path: &Path) -> io::Result<SocketFile> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        Ok(SocketFile { path: path.to_owned(), file })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // While somebody starts there, the file is theirs, or they are about to remove it.
        if let Ok(_start) = lock_start(self.path.display())
            && let (Ok(own), Ok(there)) = (self.file.metadata(), fs::symlink_metadata(&self.path))
            && (own.dev(), own.ino()) == (there.dev(), there.ino())
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Of two instances that start at once, neither listens when the other looks. An abstract Unix
/// name is as unique as a port in a network namespace, and goes with the process.
///
/// # Errors
/// `EADDRINUSE` while another instance starts there.
pub(crate) fn lock_start(addr: impl std::fmt::Display) -> io::Result<OwnedFd> {
    let name = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    let text = format!("slipring-start-{addr}").into_bytes();
    // The end of a long path tells more than its beginning.
    let text = &text[(text.len() + 1).saturating_sub(NAME_BYTES_MAX)..];
    name.bind(&SockAddr::unix(OsStr::from_bytes(&[b"\0", text].concat()))?)?;
    Ok(OwnedFd::from(name))
}

/// Removes a socket that a process has left behind; one that somebody listens on stays.
///
/// # Errors
/// `EADDRINUSE` where somebody does.
pub(crate) fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A full queue is one that somebody has, and nothing to wait for.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Ok(()) => Err(io::Error::from_raw_os_error(libc::EADDRINUSE)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
        }
        Err(error) => Err(error),
    }
}

/// `sun_path` without room for a terminating zero (unix(7)).
const NAME_BYTES_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("slipring-{name}-{}", std::process::id()))
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn only_the_own_file_is_removed() {
        let path = path("own");
        let first = UnixListener::bind(&path).expect("bind");
        let file = SocketFile::of(&path).expect("its file");
        // Nothing but what is held keeps the number of the file from being given again.
        drop(first);
        fs::remove_file(&path).expect("a successor removes it");
        let second = UnixListener::bind(&path).expect("and binds its own");
        drop(file);
        assert!(path.exists(), "the successor's");
        drop(SocketFile::of(&path).expect("its file"));
        assert!(!path.exists());
        drop(second);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn names_that_are_too_long_still_tell_paths_apart() {
        let long = format!("/{}/", "ä".repeat(100));
        let first = lock_start(format!("{long}a")).expect("nobody starts there");
        assert!(lock_start(format!("{long}a")).is_err(), "somebody does");
        lock_start(format!("{long}b")).expect("that is another path");
        drop(first);
        lock_start(format!("{long}a")).expect("nobody any more");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no sockets")]
    fn a_full_queue_is_somebodys_and_not_waited_for() {
        let path = path("full");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        listener.bind(&SockAddr::unix(&path).expect("a path")).expect("bind");
        listener.listen(0).expect("listen");
        let _queued = std::os::unix::net::UnixStream::connect(&path).expect("fill the queue");
        let error = remove_stale(&path).expect_err("somebody listens");
        assert_eq!(error.raw_os_error(), Some(libc::EADDRINUSE));
        drop(listener);
        remove_stale(&path).expect("nobody does");
        assert!(!path.exists());
    }
}

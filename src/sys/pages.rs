//! Zeroed memory straight from the kernel: page-aligned, and not there before it is touched.

use std::io;
use std::ptr::NonNull;

/// Some pages, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Pages {
    address: NonNull<u8>,
    bytes: usize,
}

impl Pages {
    /// Maps room for so many bytes (`mmap(2)`, private and anonymous).
    ///
    /// # Errors
    /// `EINVAL` for none, and the kernel's refusal.
    pub(super) fn new(bytes: usize) -> io::Result<Pages> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address of the kernel's choice, touches no other memory.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Pages { address, bytes })
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and whoever has its address goes by the
        // owner's rules, which are the same as for memory that is freed.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_it_is_there_before_it_is_touched() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").expect("the kernel tells");
            let pages = text.split(' ').nth(1).and_then(|word| word.parse::<usize>().ok());
            4096 * pages.expect("statm(5) has it")
        };
        let before = resident();
        let pages = Pages::new(256 << 20).expect("address space");
        assert!(resident() < before + (128 << 20), "{before} before, {} now", resident());
        // SAFETY: inside of the mapping.
        let last = unsafe { pages.address().add((256 << 20) - 1) };
        // SAFETY: readable, and zero.
        assert_eq!(unsafe { last.read() }, 0);
        assert!(Pages::new(0).is_err());
    }
}

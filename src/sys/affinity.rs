//! On which CPUs a thread may run: `sched_getaffinity(2)` and `sched_setaffinity(2)`.
//!
//! The masks are plain words rather than `cpu_set_t`, which ends at 1,024 CPUs.

use std::io;

/// The CPUs that the calling thread may run on, in ascending order.
///
/// # Errors
///
/// Whatever `sched_getaffinity(2)` fails with, such as `EPERM` under a strict seccomp filter.
pub(crate) fn allowed() -> io::Result<Vec<u16>> {
    // The kernel says EINVAL to a mask shorter than its own; how long that is stands nowhere.
    let mut mask: Vec<libc::c_ulong> = vec![0; 1024 / WORD_BITS];
    while let Err(error) = get(&mut mask) {
        if error.raw_os_error() != Some(libc::EINVAL) || mask.len() * WORD_BITS >= CPUS_MAX {
            return Err(error);
        }
        let words = mask.len() * 2;
        mask.resize(words, 0);
    }
    Ok((0..=u16::MAX).take(mask.len() * WORD_BITS).filter(|&cpu| contains(&mask, cpu)).collect())
}

/// Binds the calling thread to one CPU.
///
/// # Errors
///
/// `EINVAL` when the CPU does not exist, is offline, or is outside the cgroup's cpuset.
pub(crate) fn pin(cpu: u16) -> io::Result<()> {
    set(&only(cpu))
}

/// Lets the calling thread run wherever the process's main thread may, whatever it has inherited.
///
/// # Errors
///
/// As [`allowed`].
#[cfg(feature = "blocking")]
pub(crate) fn as_main_thread() -> io::Result<()> {
    let mut mask = vec![0; CPUS_MAX / WORD_BITS];
    get_of(std::process::id(), &mut mask)?;
    set(&mask)
}

fn get(mask: &mut [libc::c_ulong]) -> io::Result<()> {
    get_of(0, mask)
}

/// The mask of a thread; that of the process's number is the main thread, 0 the calling one.
fn get_of(thread: u32, mask: &mut [libc::c_ulong]) -> io::Result<()> {
    let bytes = size_of_val(mask);
    // SAFETY: the pointer and the length are those of one live slice of integers, which the
    // kernel fills before the call returns; any bit pattern is a valid integer.
    let result = unsafe { libc::sched_getaffinity(thread as _, bytes, mask.as_mut_ptr().cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set(mask: &[libc::c_ulong]) -> io::Result<()> {
    let bytes = size_of_val(mask);
    // SAFETY: the pointer and the length are those of one live slice, which the kernel only
    // reads, and only before the call returns.
    let result = unsafe { libc::sched_setaffinity(0, bytes, mask.as_ptr().cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn only(cpu: u16) -> Vec<libc::c_ulong> {
    let cpu = usize::from(cpu);
    let mut mask = vec![0; cpu / WORD_BITS + 1];
    mask[cpu / WORD_BITS] |= 1 << (cpu % WORD_BITS);
    mask
}

fn contains(mask: &[libc::c_ulong], cpu: u16) -> bool {
    let cpu = usize::from(cpu);
    mask.get(cpu / WORD_BITS).is_some_and(|word| word >> (cpu % WORD_BITS) & 1 == 1)
}

const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// CPU numbers are `u16` throughout the library; Linux's own bound is 8,192.
const CPUS_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_is_ascending_and_not_empty() {
        let cpus = allowed().unwrap();
        assert!(!cpus.is_empty());
        assert!(cpus.is_sorted_by(|a, b| a < b), "{cpus:?}");
    }

    #[test]
    fn pinning_leaves_one_cpu_to_the_thread() {
        let cpus = allowed().unwrap();
        for cpu in cpus {
            let after = std::thread::spawn(move || pin(cpu).and_then(|()| allowed()));
            assert_eq!(after.join().unwrap().unwrap(), [cpu]);
        }
    }

    #[test]
    fn pinning_to_a_cpu_that_is_not_there_is_an_error() {
        let result = std::thread::spawn(|| pin(u16::MAX)).join().unwrap();
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_mask_holds_cpus_beyond_1024() {
        for cpu in [0, 63, 64, 1023, 1024, 8191, u16::MAX] {
            let mask = only(cpu);
            let found: Vec<u16> = (0..=u16::MAX).filter(|&c| contains(&mask, c)).collect();
            assert_eq!(found, [cpu]);
        }
    }

    #[test]
    fn a_mask_that_is_too_short_is_refused_and_not_overrun() {
        // No word at all is never enough; what lies behind it stays untouched.
        let mut words: [libc::c_ulong; 2] = [0, 0x5a];
        assert!(get(&mut words[..0]).is_err());
        assert_eq!(words, [0, 0x5a]);
    }
}

//! Why the kernel refuses a ring, and what to do: read from the machine's facts, not guessed.

use std::io;
use std::thread;
use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::machine::{Capability, Facts, nofile_remedy};

/// The ring that was asked for, where the caller knows it: the message is then more precise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAsked {
    /// `IORING_SETUP_*`.
    pub(crate) flags: u32,
    pub(crate) sq_entries: u32,
    pub(crate) cq_entries: u32,
}

/// The error for an `io_uring_setup(2)` that failed with `errno` on a machine like `facts`.
///
/// `Unsupported` means that this machine gives no rings, `Resource` that it has run out of
/// something.
pub(crate) fn explain_setup_failure(errno: i32, ring: RingAsked, facts: &Facts) -> Error {
    let error = Error::os("set up an io_uring", io::Error::from_raw_os_error(errno));
    match errno {
        libc::ENOSYS => error.with_kind(ErrorKind::Unsupported).because(no_system_call(facts)),
        libc::EPERM | libc::EACCES => {
            error.with_kind(ErrorKind::Unsupported).because(forbidden(facts))
        }
        libc::EOPNOTSUPP => error
            .with_kind(ErrorKind::Unsupported)
            .because("a sandbox or a managed platform rejects io_uring; run outside of it"),
        libc::EINVAL => error.with_kind(ErrorKind::Unsupported).because(rejected(ring, facts)),
        libc::ENOMEM => error.with_kind(ErrorKind::Resource).because(no_memory(ring, facts)),
        libc::EMFILE => error.with_kind(ErrorKind::Resource).because(no_descriptor(facts)),
        libc::ENFILE => error.with_kind(ErrorKind::Resource).because(
            "the whole machine is out of file descriptors: raise the sysctl fs.file-max, or find \
             the process that holds them",
        ),
        _ => error,
    }
}

/// The error for a ring that could not be made.
pub(crate) fn explain(error: io::Error, ring: RingAsked, facts: &Facts) -> Error {
    match error.raw_os_error() {
        Some(errno) => explain_setup_failure(errno, ring, facts),
        None => Error::os("set up an io_uring", error),
    }
}

/// Tries again for a second when there is no memory for a ring: what the kernel has charged for
/// one that was closed it gives back with a delay, the longer the busier it is.
pub(crate) fn retry_without_memory<T>(mut make: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..MEMORY_TRIES {
        match make() {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => thread::sleep(MEMORY_WAIT),
            result => return result,
        }
    }
    make()
}

/// How many bytes of locked memory a ring is charged: its submission entries, and its completion
/// entries with both rings' indices, each in whole pages.
pub(crate) fn ring_bytes(sq_entries: u32, cq_entries: u32) -> u64 {
    let (sq, cq) = (u64::from(sq_entries), u64::from(cq_entries));
    let pages = |bytes: u64| bytes.next_multiple_of(PAGE_BYTES);
    pages(sq * SQE_BYTES) + pages(RINGS_HEAD_BYTES + cq * CQE_BYTES + sq * 4)
}

fn no_system_call(facts: &Facts) -> String {
    let release = facts.release.as_deref().unwrap_or_default();
    match facts.kernel() {
        Some(kernel) if kernel < FIRST => format!(
            "this kernel calls itself {release} and io_uring came with 5.1 (gVisor calls itself \
             4.4 on any machine); upgrade to {NEEDED_TEXT} or later"
        ),
        Some(_) if facts.seccomp == Some(2) => format!(
            "kernel {release} could have io_uring, but a seccomp filter is in force (Seccomp: 2 in \
             /proc/self/status), and one may hide system calls; {ALLOW}"
        ),
        Some(_) => format!(
            "kernel {release} is built without io_uring, or a sandbox such as gVisor hides it; run \
             outside of the sandbox or with another kernel"
        ),
        None => "the kernel is older than 5.1, or a seccomp filter or a sandbox such as gVisor \
                 hides the system call (its release could not be read)"
            .to_owned(),
    }
}

fn forbidden(facts: &Facts) -> String {
    let exempt = facts.can_over_machine(Capability::SysAdmin) == Some(true);
    match (facts.io_uring_disabled, facts.seccomp) {
        (Some(2), _) => {
            "the sysctl kernel.io_uring_disabled is 2, which is nobody; set it to 0".to_owned()
        }
        (Some(1), seccomp) if !(exempt && seccomp == Some(2)) => {
            let group = match facts.io_uring_group {
                Some(gid) if gid >= 0 => format!("group {gid} (kernel.io_uring_group)"),
                _ => "the group in kernel.io_uring_group, which is unset".to_owned(),
            };
            format!(
                "the sysctl kernel.io_uring_disabled is 1, which leaves io_uring to CAP_SYS_ADMIN \
                 and {group}; set it to 0, run the service in that group"
            )
        }
        (_, Some(2)) => format!(
            "a seccomp filter is in force (Seccomp: 2 in /proc/self/status), and the default ones \
             of Docker, containerd and Kubernetes forbid io_uring; {ALLOW}"
        ),
        (sysctl, Some(_)) => {
            let sysctl = match sysctl {
                Some(value) => format!("kernel.io_uring_disabled is {value}"),
                None => "there is no sysctl kernel.io_uring_disabled".to_owned(),
            };
            format!(
                "{sysctl} and no seccomp filter is in force, which leaves a security module \
                 (SELinux, AppArmor, a BPF LSM): see the audit log"
            )
        }
        (_, None) => format!(
            "neither the sysctl kernel.io_uring_disabled nor Seccomp in /proc/self/status tells \
             why; a container's default seccomp profile is the usual cause; {ALLOW}"
        ),
    }
}

fn rejected(ring: RingAsked, facts: &Facts) -> String {
    let asked = format!(
        " (flags {:#x}, {} submission and {} completion entries)",
        ring.flags, ring.sq_entries, ring.cq_entries
    );
    let release = facts.release.as_deref().unwrap_or_default();
    match facts.kernel() {
        Some(kernel) if kernel < NEEDED => {
            format!("kernel {release} found, {NEEDED_TEXT} needed{asked}; upgrade the kernel")
        }
        Some(_) => format!(
            "kernel {release} should know everything that was asked for{asked}, as {NEEDED_TEXT} \
             does, but rejects it: a vendor's change, or entries out of bounds; check \
             SLIPRING_SQ_ENTRIES and SLIPRING_CQ_ENTRIES, try another kernel"
        ),
        None => format!(
            "the kernel's release could not be read; {NEEDED_TEXT} is needed{asked}; upgrade the \
             kernel if it is older"
        ),
    }
}

fn no_memory(ring: RingAsked, facts: &Facts) -> String {
    let needs = format!("this ring needs {} bytes", ring_bytes(ring.sq_entries, ring.cq_entries));
    if facts.can_over_machine(Capability::IpcLock) == Some(true) {
        return format!(
            "{needs} and CAP_IPC_LOCK exempts it from RLIMIT_MEMLOCK, so the machine or the memory \
             cgroup is out of memory; give it more, or lower SLIPRING_CQ_ENTRIES"
        );
    }
    let limit = match facts.memlock {
        Some((soft, _)) if soft == u64::MAX => {
            return format!(
                "{needs} and RLIMIT_MEMLOCK is unlimited, so the machine or the memory cgroup is \
                 out of memory; give it more, or lower SLIPRING_CQ_ENTRIES"
            );
        }
        Some((soft, _)) => format!("RLIMIT_MEMLOCK is {soft} bytes"),
        None => "RLIMIT_MEMLOCK could not be read".to_owned(),
    };
    format!(
        "{limit} for all processes of this user together, and {needs} (kernels from 6.14 and up to \
         5.11 charge rings to it); raise it with systemd's LimitMEMLOCK= or `ulimit -l`, grant \
         CAP_IPC_LOCK, or lower SLIPRING_SQ_ENTRIES and SLIPRING_CQ_ENTRIES"
    )
}

fn no_descriptor(facts: &Facts) -> String {
    let open = facts.open_fds.map_or_else(String::new, |open| format!("{open} are open; "));
    let remedy = match facts.nofile {
        Some((soft, hard)) => nofile_remedy(soft, hard),
        None => "raise the limit with `ulimit -n` or systemd's LimitNOFILE=, or lower \
                 SLIPRING_CONNECTIONS_MAX"
            .to_owned(),
    };
    format!("the process is out of file descriptors; {open}{remedy}")
}

/// The first kernel with io_uring, and the first with all that the io_uring driver rests on.
const FIRST: (u32, u32) = (5, 1);
pub(crate) const NEEDED: (u32, u32) = (6, 1);
pub(crate) const NEEDED_TEXT: &str = "6.1";

const ALLOW: &str = "allow io_uring_setup, io_uring_enter and io_uring_register in the profile";

const MEMORY_TRIES: u32 = 100;
const MEMORY_WAIT: Duration = Duration::from_millis(10);

const SQE_BYTES: u64 = 64;
const CQE_BYTES: u64 = 16;
/// `struct io_rings` without its entries.
const RINGS_HEAD_BYTES: u64 = 64;
const PAGE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const RING: RingAsked = RingAsked { flags: 0x3280, sq_entries: 512, cq_entries: 4096 };

    fn check(errno: i32, facts: &Facts, kind: ErrorKind, parts: &[&str]) {
        let error = explain_setup_failure(errno, RING, facts);
        let text = error.to_string();
        assert_eq!(error.kind(), kind, "{text}");
        assert_eq!(error.raw_os_error(), Some(errno));
        assert!(text.starts_with("set up an io_uring: "), "{text}");
        assert!(!text.ends_with('.') && !text.contains("  "), "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in: {text}");
        }
    }

    fn kernel(release: &str) -> Facts {
        Facts { release: Some(release.to_owned()), ..Facts::default() }
    }

    #[test]
    fn a_missing_system_call_is_the_kernel_or_what_hides_it() {
        let unsupported = ErrorKind::Unsupported;
        check(libc::ENOSYS, &kernel("4.4.0"), unsupported, &["4.4.0", "gVisor", "6.1"]);
        check(libc::ENOSYS, &kernel("6.8.0-1"), unsupported, &["6.8.0-1", "without io_uring"]);
        let filtered = Facts { seccomp: Some(2), ..kernel("6.8.0") };
        check(libc::ENOSYS, &filtered, unsupported, &["Seccomp: 2", "io_uring_register"]);
    }

    #[test]
    fn the_sysctl_is_blamed_when_it_forbids() {
        for errno in [libc::EPERM, libc::EACCES] {
            let facts = Facts { io_uring_disabled: Some(2), seccomp: Some(2), ..kernel("6.12.0") };
            let parts = ["kernel.io_uring_disabled is 2", "set it to 0"];
            check(errno, &facts, ErrorKind::Unsupported, &parts);
        }
        let group = Facts {
            io_uring_disabled: Some(1),
            io_uring_group: Some(1005),
            seccomp: Some(0),
            ..Facts::default()
        };
        let parts = ["kernel.io_uring_disabled is 1", "group 1005", "CAP_SYS_ADMIN"];
        check(libc::EPERM, &group, ErrorKind::Unsupported, &parts);
        let unset = Facts { io_uring_group: Some(-1), ..group };
        check(libc::EPERM, &unset, ErrorKind::Unsupported, &["which is unset"]);
    }

    #[test]
    fn seccomp_is_blamed_when_the_sysctl_does_not_forbid() {
        for sysctl in [None, Some(0)] {
            let facts = Facts { io_uring_disabled: sysctl, seccomp: Some(2), ..Facts::default() };
            let parts = ["Seccomp: 2", "Docker", "containerd", "Kubernetes", "io_uring_enter"];
            check(libc::EPERM, &facts, ErrorKind::Unsupported, &parts);
        }
    }

    #[test]
    fn an_exemption_from_the_sysctl_leaves_seccomp() {
        let admin = Facts {
            io_uring_disabled: Some(1),
            seccomp: Some(2),
            capabilities: Some(1 << 21),
            init_user_namespace: Some(true),
            ..Facts::default()
        };
        check(libc::EPERM, &admin, ErrorKind::Unsupported, &["Seccomp: 2"]);
        let contained = Facts { init_user_namespace: Some(false), ..admin };
        check(libc::EPERM, &contained, ErrorKind::Unsupported, &["io_uring_disabled is 1"]);
    }

    #[test]
    fn a_security_module_is_what_is_left() {
        let facts = Facts { io_uring_disabled: Some(0), seccomp: Some(0), ..Facts::default() };
        check(libc::EPERM, &facts, ErrorKind::Unsupported, &["SELinux", "audit log"]);
    }

    #[test]
    fn an_old_kernel_is_named_with_the_one_that_is_needed() {
        let parts = ["kernel 5.15.0-91 found, 6.1 needed", "upgrade"];
        check(libc::EINVAL, &kernel("5.15.0-91"), ErrorKind::Unsupported, &parts);
        let parts = ["6.8.0-138", "vendor", "SLIPRING_CQ_ENTRIES"];
        check(libc::EINVAL, &kernel("6.8.0-138"), ErrorKind::Unsupported, &parts);
        let text = explain_setup_failure(libc::EINVAL, RING, &kernel("5.10.0")).to_string();
        assert!(text.contains("flags 0x3280, 512 submission and 4096 completion"), "{text}");
    }

    #[test]
    fn memory_is_the_limit_or_the_machine() {
        let user =
            Facts { memlock: Some((8 << 20, 8 << 20)), capabilities: Some(0), ..kernel("6.18.0") };
        let parts = ["RLIMIT_MEMLOCK is 8388608 bytes", "LimitMEMLOCK=", "CAP_IPC_LOCK", "6.14"];
        check(libc::ENOMEM, &user, ErrorKind::Resource, &parts);
        let text = explain_setup_failure(libc::ENOMEM, RING, &user).to_string();
        assert!(text.contains("this ring needs 102400 bytes"), "{text}");
        let exempt = Facts { capabilities: Some(1 << 14), ..user.clone() };
        check(libc::ENOMEM, &exempt, ErrorKind::Resource, &["CAP_IPC_LOCK exempts", "cgroup"]);
        let unlimited = Facts { memlock: Some((u64::MAX, u64::MAX)), ..user };
        check(libc::ENOMEM, &unlimited, ErrorKind::Resource, &["unlimited", "cgroup"]);
    }

    #[test]
    fn descriptors_are_the_process_or_the_machine() {
        let facts = Facts { nofile: Some((1024, 4096)), open_fds: Some(1020), ..Facts::default() };
        let parts = ["1020 are open", "1024", "4096", "ulimit -n", "LimitNOFILE="];
        check(libc::EMFILE, &facts, ErrorKind::Resource, &parts);
        check(libc::ENFILE, &facts, ErrorKind::Resource, &["fs.file-max"]);
    }

    #[test]
    fn every_refusal_has_a_cause_and_a_remedy_without_any_fact() {
        let nothing = Facts::default();
        let unsupported = ErrorKind::Unsupported;
        check(libc::ENOSYS, &nothing, unsupported, &["older than 5.1", "seccomp"]);
        for errno in [libc::EPERM, libc::EACCES] {
            check(errno, &nothing, unsupported, &["seccomp profile", "allow io_uring_setup"]);
        }
        check(libc::EOPNOTSUPP, &nothing, unsupported, &["sandbox", "outside"]);
        check(libc::EINVAL, &nothing, unsupported, &["6.1 is needed", "upgrade"]);
        check(libc::ENOMEM, &nothing, ErrorKind::Resource, &["could not be read", "102400 bytes"]);
        check(libc::EMFILE, &nothing, ErrorKind::Resource, &["ulimit -n"]);
        check(libc::ENFILE, &nothing, ErrorKind::Resource, &["fs.file-max"]);
        check(libc::EFAULT, &nothing, ErrorKind::Io, &[]);
    }

    /// What was measured: how many rings of a size an 8 MiB limit held on Linux 6.18.
    #[test]
    fn ring_bytes_agrees_with_what_the_kernel_charges() {
        for (sq, cq, rings) in [
            (256, 1024, 227),
            (512, 4096, 81),
            (1024, 8192, 40),
            (4096, 8192, 20),
            (4096, 16384, 15),
        ] {
            assert_eq!((8 << 20) / ring_bytes(sq, cq), rings, "{sq}/{cq}");
        }
    }
}

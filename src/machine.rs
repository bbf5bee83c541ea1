//! What the machine is like: facts from `/proc` and `/sys`, and the two policies that rest on them.
//!
//! A fact that cannot be read, or is not understood, is `None`; nothing here panics on it. The
//! parsers are pure, and [`Facts::gather`] is told how to read, so that tests invent machines.

use std::fs::File;
use std::io::{self, Read as _};

use crate::error::{Error, ErrorKind, Result};
use crate::json::{self, JsonObject};
use crate::sys::{affinity, limits};

/// The facts about kernel, container and limits that the library's decisions rest on.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Facts {
    /// The kernel's release as it calls itself: `6.12.9-amd64`.
    pub(crate) release: Option<String>,
    /// `kernel.io_uring_disabled`: 0 for all, 1 for a group only, 2 for nobody. Since 6.6.
    pub(crate) io_uring_disabled: Option<u64>,
    /// `kernel.io_uring_group`; -1 is no group.
    pub(crate) io_uring_group: Option<i64>,
    /// `Seccomp:` of this process: 0 none, 1 strict, 2 a filter.
    pub(crate) seccomp: Option<u64>,
    pub(crate) no_new_privs: Option<bool>,
    /// The effective capabilities as a bit set; see [`Facts::can`].
    pub(crate) capabilities: Option<u64>,
    /// Whether the process is in the machine's own user namespace, where capabilities count.
    pub(crate) init_user_namespace: Option<bool>,
    /// The tightest CPU quota of the process's cgroups, in CPUs; `None` is also "no quota".
    pub(crate) quota_cpus: Option<f64>,
    /// In how many periods a quota stopped the process's cgroups, all levels together.
    pub(crate) nr_throttled: Option<u64>,
    /// `net.core.somaxconn`, in connections per listener.
    pub(crate) somaxconn: Option<u64>,
    /// `net.ipv4.tcp_migrate_req`. Since 5.14.
    pub(crate) tcp_migrate_req: Option<bool>,
    /// `net.ipv4.tcp_syncookies`: 0 off, 1 when the queue is full, 2 always.
    pub(crate) tcp_syncookies: Option<u64>,
    /// `net.ipv4.tcp_congestion_control`.
    pub(crate) congestion: Option<String>,
    /// The file that says that this is a container.
    pub(crate) container: Option<&'static str>,
    /// `RLIMIT_NOFILE`, soft and hard, in descriptors; `u64::MAX` is unlimited.
    pub(crate) nofile: Option<(u64, u64)>,
    /// `RLIMIT_MEMLOCK`, soft and hard, in bytes; `u64::MAX` is unlimited.
    pub(crate) memlock: Option<(u64, u64)>,
    pub(crate) open_fds: Option<usize>,
    /// The affinity mask of the calling thread.
    pub(crate) allowed_cpus: Option<Vec<u16>>,
}

/// A capability's bit in `CapEff`, from `include/uapi/linux/capability.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    NetAdmin = 12,
    IpcLock = 14,
    SysAdmin = 21,
}

/// Reads a file whole, or says that it is not there.
type Reader<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Facts {
    /// The facts of this machine, now.
    pub(crate) fn read() -> Facts {
        Facts {
            nofile: limits::nofile().ok(),
            memlock: limits::memlock().ok(),
            open_fds: limits::open_fds(),
            allowed_cpus: affinity::allowed().ok(),
            ..Facts::gather(&read_file)
        }
    }

    /// The facts that files hold, read through `read`.
    pub(crate) fn gather(read: Reader<'_>) -> Facts {
        let number = |path| read(path).as_deref().and_then(parse_number);
        let word = |path| read(path).as_deref().and_then(parse_word);
        let status = read("/proc/self/status").unwrap_or_default();
        let cgroup = read("/proc/self/cgroup").unwrap_or_default();
        let (quota_cpus, nr_throttled) = cpu_limits(&cgroup, read);
        Facts {
            release: word("/proc/sys/kernel/osrelease"),
            io_uring_disabled: number("/proc/sys/kernel/io_uring_disabled"),
            io_uring_group: word("/proc/sys/kernel/io_uring_group").and_then(|w| w.parse().ok()),
            seccomp: status_field(&status, "Seccomp").and_then(parse_number),
            no_new_privs: status_field(&status, "NoNewPrivs").and_then(parse_switch),
            capabilities: status_field(&status, "CapEff").and_then(parse_hex),
            init_user_namespace: read("/proc/self/uid_map").as_deref().map(is_identity_map),
            quota_cpus,
            nr_throttled,
            somaxconn: number("/proc/sys/net/core/somaxconn"),
            tcp_migrate_req: read("/proc/sys/net/ipv4/tcp_migrate_req")
                .as_deref()
                .and_then(parse_switch),
            tcp_syncookies: number("/proc/sys/net/ipv4/tcp_syncookies"),
            congestion: word("/proc/sys/net/ipv4/tcp_congestion_control"),
            container: CONTAINER_FILES.into_iter().find(|path| read(path).is_some()),
            ..Facts::default()
        }
    }

    /// The facts as one JSON object; what is not known is `null`.
    pub(crate) fn to_json(&self) -> String {
        let text = |word: &str| json::quoted(word);
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        let switch = |switch: Option<bool>| switch.map(|switch| switch.to_string());
        let limit = |limit: Option<u64>| match limit {
            Some(u64::MAX) => Some(text("unlimited")),
            limit => number(limit),
        };
        let cpus = self.allowed_cpus.as_ref();
        let cpus = cpus.map(|cpus| json::array(cpus.iter().map(u16::to_string)));
        JsonObject::new()
            .raw_or_null("release", self.release.as_deref().map(text))
            .raw_or_null("io_uring_disabled", number(self.io_uring_disabled))
            .raw_or_null("io_uring_group", self.io_uring_group.map(|gid| gid.to_string()))
            .raw_or_null("seccomp", number(self.seccomp))
            .raw_or_null("no_new_privs", switch(self.no_new_privs))
            .raw_or_null("quota_cpus", self.quota_cpus.map(|cpus| cpus.to_string()))
            .raw_or_null("nr_throttled", number(self.nr_throttled))
            .raw_or_null("somaxconn", number(self.somaxconn))
            .raw_or_null("tcp_migrate_req", switch(self.tcp_migrate_req))
            .raw_or_null("tcp_syncookies", number(self.tcp_syncookies))
            .raw_or_null("congestion", self.congestion.as_deref().map(text))
            .raw_or_null("container", self.container.map(text))
            .raw_or_null("nofile_soft", limit(self.nofile.map(|(soft, _)| soft)))
            .raw_or_null("nofile_hard", limit(self.nofile.map(|(_, hard)| hard)))
            .raw_or_null("memlock_soft", limit(self.memlock.map(|(soft, _)| soft)))
            .raw_or_null("memlock_hard", limit(self.memlock.map(|(_, hard)| hard)))
            .raw_or_null("open_fds", number(self.open_fds.map(|open| open as u64)))
            .raw_or_null("allowed_cpus", cpus)
            .finish()
    }

    /// The kernel's major and minor number.
    pub(crate) fn kernel(&self) -> Option<(u32, u32)> {
        parse_release(self.release.as_deref()?)
    }

    /// Whether the process has the capability; in a container's user namespace it has it there.
    pub(crate) fn can(&self, capability: Capability) -> Option<bool> {
        self.capabilities.map(|bits| bits >> (capability as u32) & 1 == 1)
    }

    /// Whether the process has the capability over the machine, which some checks ask for.
    pub(crate) fn can_over_machine(&self, capability: Capability) -> Option<bool> {
        self.can(capability).map(|has| has && self.init_user_namespace != Some(false))
    }
}

/// The CPUs to run cores on: as many of the allowed ones as the quota pays for, at least one.
///
/// A quota of 1.5 CPUs gives two cores. CPU 0 stands in for an empty mask.
pub(crate) fn default_cpus(allowed: &[u16], quota: Option<f64>) -> Vec<u16> {
    // The cast saturates, and NaN becomes zero.
    let paid_for = quota.map_or(usize::MAX, |cpus| (cpus.ceil() as usize).max(1));
    if allowed.is_empty() { vec![0] } else { allowed.iter().copied().take(paid_for).collect() }
}

/// Whether each core's thread is pinned to its CPU; if nobody says so, unless the quota allows
/// fewer CPUs than there are cores.
pub(crate) fn pins(asked: Option<bool>, quota: Option<f64>, cores: usize) -> bool {
    asked.unwrap_or(quota.is_none_or(|cpus| cpus >= cores as f64))
}

/// Raises the soft limit on file descriptors to at least `needed`, where the hard one allows.
///
/// # Errors
///
/// `Resource` when the hard limit is below `needed`; the message says how to raise it.
pub(crate) fn ensure_nofile(needed: u64) -> Result<()> {
    let operation = || format!("raise RLIMIT_NOFILE to {needed} file descriptors");
    let (soft, hard) = limits::nofile().map_err(|error| Error::os(operation(), error))?;
    if soft >= needed {
        return Ok(());
    }
    if hard < needed {
        return Err(Error::new(ErrorKind::Resource, operation()).because(nofile_remedy(soft, hard)));
    }
    limits::set_nofile_soft(needed).map_err(|error| {
        Error::os(operation(), error)
            .with_kind(ErrorKind::Resource)
            .because(nofile_remedy(soft, hard))
    })
}

/// What stands against more descriptors, and what to do: for messages.
pub(crate) fn nofile_remedy(soft: u64, hard: u64) -> String {
    format!(
        "the soft limit is {} and the hard limit {}: raise them with `ulimit -n` or systemd's \
         LimitNOFILE=, or lower SLIPRING_CONNECTIONS_MAX",
        limit_text(soft),
        limit_text(hard)
    )
}

/// A limit in words.
pub(crate) fn limit_text(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".to_owned() } else { limit.to_string() }
}

/// A list of CPUs in the kernel's short form: `0-3,8`.
pub(crate) fn cpu_list(cpus: &[u16]) -> String {
    let runs = cpus.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let text = runs.map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run.iter().map(u16::to_string).collect(),
    });
    text.collect::<Vec<String>>().join(",")
}

/// A file's text, or `None` when it is not there; empty when it is there but kept from us.
fn read_file(path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    match File::open(path) {
        // A half-read file is parsed as far as it came.
        Ok(file) => drop(file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(_) => return None,
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The tightest CPU quota and the sum of the throttled periods, over the cgroup and all above it.
///
/// In a container without a cgroup namespace the path is the host's and leads nowhere below the
/// mount; walking up then ends at the mount's root, which is the container's own cgroup.
fn cpu_limits(cgroup: &str, read: Reader<'_>) -> (Option<f64>, Option<u64>) {
    let mut quota: Option<f64> = None;
    let mut throttled: Option<u64> = None;
    let v2 = (&CGROUP_V2_ROOTS, "cgroup.controllers", cgroup_path(cgroup, ""));
    let v1 = (&CGROUP_V1_ROOTS, "cpu.stat", cgroup_path(cgroup, "cpu"));
    for (roots, witness, path) in [v2, v1] {
        let Some(path) = path else { continue };
        let Some(root) = roots.iter().find(|root| read(&format!("{root}/{witness}")).is_some())
        else {
            continue;
        };
        for level in levels(path) {
            let file = |name: &str| read(&format!("{root}{level}/{name}"));
            let max = file("cpu.max").as_deref().and_then(parse_cpu_max);
            let cfs = file("cpu.cfs_quota_us").zip(file("cpu.cfs_period_us"));
            let cfs = cfs.and_then(|(quota, period)| parse_quota(&quota, &period));
            for cpus in [max, cfs].into_iter().flatten() {
                quota = Some(quota.map_or(cpus, |tightest| tightest.min(cpus)));
            }
            if let Some(count) = file("cpu.stat").as_deref().and_then(parse_nr_throttled) {
                throttled = Some(throttled.unwrap_or(0).saturating_add(count));
            }
        }
    }
    (quota, throttled)
}

/// The path of the hierarchy with this controller in `/proc/self/cgroup`; v2 has no controller.
fn cgroup_path<'a>(cgroup: &'a str, controller: &str) -> Option<&'a str> {
    cgroup.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        controllers.split(',').any(|c| c == controller).then_some(path)
    })
}

/// The path and all above it, deepest first, ending with the root, which is the empty string.
fn levels(path: &str) -> Vec<String> {
    let parts: Vec<&str> =
        path.split('/').filter(|part| !matches!(*part, "" | "." | "..")).collect();
    let level = |depth: usize| parts[..depth].iter().map(|part| format!("/{part}")).collect();
    (0..=parts.len()).rev().map(level).collect()
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split('.').map(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..end].parse().ok()
    });
    Some((numbers.next()??, numbers.next()??))
}

fn parse_number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn parse_word(text: &str) -> Option<String> {
    text.split_whitespace().next().map(str::to_owned)
}

fn parse_switch(text: &str) -> Option<bool> {
    parse_number(text).map(|number| number != 0)
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim(), 16).ok()
}

/// The value of a `Name:` line in `/proc/self/status`.
fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim())
}

/// Whether `/proc/self/uid_map` maps every user to itself, as only the first namespace does.
fn is_identity_map(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// v2's `cpu.max`, such as `150000 100000` or `max 100000`, in CPUs.
fn parse_cpu_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    parse_quota(quota, period)
}

/// A quota per period, both in microseconds, in CPUs; `max` and -1 are no quota.
fn parse_quota(quota: &str, period: &str) -> Option<f64> {
    let (quota, period) = (parse_number(quota)?, parse_number(period)?);
    (quota > 0 && period > 0).then(|| quota as f64 / period as f64)
}

fn parse_nr_throttled(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| parse_number(line.strip_prefix("nr_throttled ")?))
}

const CONTAINER_FILES: [&str; 2] = ["/.dockerenv", "/run/.containerenv"];
const CGROUP_V2_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
const CGROUP_V1_ROOTS: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];

/// Far more than any of the files holds.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Why connections can't be spread by CPU.
pub(crate) const NOT_PINNED: &str = "SLIPRING_BALANCE=cpu needs cores that are pinned, and these \
                                     are not, as a cgroup's quota allows fewer CPUs than there \
                                     are cores; set SLIPRING_PIN=1, or name fewer SLIPRING_CPUS";

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Facts {
        Facts::gather(&|path| {
            files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn an_empty_machine_and_a_machine_of_garbage_have_no_facts() {
        assert_eq!(machine(&[]), Facts::default());
        for garbage in ["", "\n", ":", "::::\n\u{fffd}\0", "0:cpu", "-", "99999999999999999999999"]
        {
            let facts = Facts::gather(&|_| Some(garbage.to_owned()));
            assert_eq!(facts.kernel(), None, "{garbage:?}");
            assert_eq!((facts.quota_cpus, facts.seccomp), (None, None), "{garbage:?}");
        }
    }

    #[test]
    fn this_machine_is_read_without_a_panic() {
        let facts = Facts::read();
        assert!(facts.nofile.is_some());
        assert!(facts.allowed_cpus.is_some_and(|cpus| !cpus.is_empty()));
    }

    #[test]
    fn release_becomes_major_and_minor() {
        for (release, expected) in [
            ("6.18.44-vendor-v595", Some((6, 18))),
            ("6.1-rc3", Some((6, 1))),
            ("5.10+", Some((5, 10))),
            ("7.0.0\n", Some((7, 0))),
            ("6", None),
            ("six.one", None),
            ("", None),
        ] {
            assert_eq!(parse_release(release), expected, "{release:?}");
        }
    }

    #[test]
    fn status_tells_seccomp_privileges_and_capabilities() {
        let status = "Name:\tSeccomp: 9\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n\
                      CapEff:\t0000000000004000\n";
        let facts = machine(&[
            ("/proc/self/status", status),
            ("/proc/self/uid_map", "         0       1000          1\n"),
        ]);
        assert_eq!((facts.seccomp, facts.no_new_privs), (Some(2), Some(true)));
        assert_eq!(facts.can(Capability::IpcLock), Some(true));
        assert_eq!(facts.can_over_machine(Capability::IpcLock), Some(false));
        assert_eq!(facts.can(Capability::SysAdmin), Some(false));
        assert_eq!(Facts::default().can(Capability::NetAdmin), None);
    }

    #[test]
    fn sysctls_and_container_are_read() {
        let facts = machine(&[
            ("/proc/sys/kernel/io_uring_disabled", "1\n"),
            ("/proc/sys/kernel/io_uring_group", "-1\n"),
            ("/proc/sys/net/core/somaxconn", "4096\n"),
            ("/proc/sys/net/ipv4/tcp_migrate_req", "0\n"),
            ("/proc/sys/net/ipv4/tcp_congestion_control", "bbr\n"),
            ("/run/.containerenv", ""),
        ]);
        assert_eq!((facts.io_uring_disabled, facts.io_uring_group), (Some(1), Some(-1)));
        assert_eq!((facts.somaxconn, facts.tcp_migrate_req), (Some(4096), Some(false)));
        assert_eq!(facts.congestion.as_deref(), Some("bbr"));
        assert_eq!(facts.container, Some("/run/.containerenv"));
    }

    #[test]
    fn the_tightest_quota_of_all_levels_wins() {
        let facts = machine(&[
            ("/proc/self/cgroup", "0::/kubepods/pod1/app\n"),
            ("/sys/fs/cgroup/cgroup.controllers", "cpu memory"),
            ("/sys/fs/cgroup/kubepods/pod1/app/cpu.max", "max 100000\n"),
            ("/sys/fs/cgroup/kubepods/pod1/app/cpu.stat", "usage_usec 5\nnr_throttled 2\n"),
            ("/sys/fs/cgroup/kubepods/pod1/cpu.max", "150000 100000\n"),
            ("/sys/fs/cgroup/kubepods/pod1/cpu.stat", "nr_periods 9\nnr_throttled 40\n"),
            ("/sys/fs/cgroup/kubepods/cpu.max", "800000 100000\n"),
        ]);
        assert_eq!((facts.quota_cpus, facts.nr_throttled), (Some(1.5), Some(42)));
    }

    #[test]
    fn a_path_of_the_host_ends_at_the_mount_in_both_versions() {
        let v2 = machine(&[
            ("/proc/self/cgroup", "0::/../../docker/abc\n"),
            ("/sys/fs/cgroup/cgroup.controllers", ""),
            ("/sys/fs/cgroup/cpu.max", "50000 100000\n"),
        ]);
        assert_eq!(v2.quota_cpus, Some(0.5));
        let v1 = machine(&[
            ("/proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n0::/\n"),
            ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000\n"),
            ("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
            ("/sys/fs/cgroup/cpu,cpuacct/cpu.stat", "nr_periods 1\nnr_throttled 1\n"),
        ]);
        assert_eq!((v1.quota_cpus, v1.nr_throttled), (Some(2.5), Some(1)));
        assert_eq!(parse_quota("-1\n", "100000\n"), None);
        assert_eq!(parse_quota("100000", "0"), None);
    }

    #[test]
    fn cores_are_as_many_as_the_quota_pays_for() {
        let allowed = [1, 3, 5, 8];
        for (quota, expected) in [
            (None, &allowed[..]),
            (Some(0.1), &[1]),
            (Some(1.0), &[1]),
            (Some(1.5), &[1, 3]),
            (Some(64.0), &allowed),
            (Some(f64::INFINITY), &allowed),
            (Some(f64::NAN), &[1]),
            (Some(-1.0), &[1]),
        ] {
            assert_eq!(default_cpus(&allowed, quota), expected, "{quota:?}");
        }
        assert_eq!(default_cpus(&[], Some(2.0)), [0]);
    }

    #[test]
    fn cpus_are_listed_in_runs() {
        assert_eq!(cpu_list(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(cpu_list(&[7]), "7");
        assert_eq!(cpu_list(&[0, 2, 65534, 65535]), "0,2,65534-65535");
        assert_eq!(cpu_list(&[]), "");
    }

    #[test]
    fn the_soft_limit_is_raised_and_the_hard_one_left() {
        let (soft, hard) = limits::nofile().unwrap();
        limits::set_nofile_soft(soft - 1).unwrap();
        ensure_nofile(soft).unwrap();
        assert_eq!(limits::nofile().unwrap(), (soft, hard));
    }

    #[test]
    fn too_few_descriptors_is_an_error_that_names_all_numbers() {
        let (soft, hard) = limits::nofile().unwrap();
        ensure_nofile(soft).unwrap();
        if hard < u64::MAX {
            let error = ensure_nofile(hard + 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Resource);
            let text = error.to_string();
            for part in [&(hard + 1).to_string(), &hard.to_string(), "ulimit -n", "LimitNOFILE="] {
                assert!(text.contains(part), "{part} is not in: {text}");
            }
        }
    }
}

//! What this machine gives slipring, what it withholds, and what that costs.
//!
//! [`examine`] asks the kernel by trying small rings, reads the limits, sysctls and cgroups that
//! matter, and reports in words or in JSON. `cargo run --example doctor` prints the result.

use std::fmt;
use std::io;
use std::thread;

use crate::error::{Error, Result};
use crate::json::{self, JsonObject};
use crate::machine::{Capability, Facts, cpu_list, default_cpus, limit_text};
use crate::preflight;
use crate::refusal::{NEEDED, explain_setup_failure, ring_bytes};
use crate::spin::SpinState;

mod features;
mod finding;

use features::{Answer, Answers, DRIVER_RING, Feature};
use finding::{Finding, known};

/// Examines the machine for what slipring needs.
///
/// This makes a few small rings and sockets and closes them again, reads `/proc` and `/sys`, and
/// changes nothing. It takes milliseconds and needs no privilege.
///
/// # Examples
///
/// ```
/// let examination = slipring::doctor::examine();
/// let words = examination.to_string();
/// assert!(words.starts_with(if examination.is_fit() { "fit" } else { "not fit" }));
/// ```
#[must_use]
pub fn examine() -> Examination {
    examine_with(preflight::check)
}

/// As [`examine`], with a trial run of the driver as the last question.
///
/// `preflight` drives a socket pair through the real driver (arm a multishot receive, write, reap,
/// run out of buffers, end of stream) and returns the first thing that differs from what the
/// library relies on. It is not run where the kernel refuses rings.
pub(crate) fn examine_with(preflight: fn() -> Result<()>) -> Examination {
    let facts = Facts::read();
    // On a thread of its own, as closing a ring interrupts the system calls of its maker.
    let answers = thread::scope(|scope| scope.spawn(Answers::ask).join());
    let answers = answers.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let preflight = answers.ring.is_ok().then(preflight);
    Examination::new(facts, answers, preflight)
}

/// What [`examine`] found. `Display` tells it in words, one finding a line.
#[derive(Debug)]
pub struct Examination {
    refusal: Option<Error>,
    /// Whether the trial run passed; `None` where it was not run.
    preflight: Option<bool>,
    features: Vec<(&'static Feature, Answer)>,
    facts: Facts,
    /// What follows from a configuration.
    configured: Vec<Finding>,
}

impl Examination {
    /// Whether the io_uring driver runs here: rings are to be had, with every feature that the
    /// driver cannot do without.
    /// Where it is `false`, a server refuses to start, for the reason that
    /// [`Examination::refusal`] has.
    ///
    /// # Examples
    ///
    /// ```
    /// let examination = slipring::doctor::examine();
    /// assert_eq!(examination.is_fit(), examination.refusal().is_none());
    /// ```
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.refusal.is_none()
    }

    /// Why the io_uring driver does not run here, and the remedy; `None` where it does.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::ErrorKind;
    ///
    /// let examination = slipring::doctor::examine();
    /// if let Some(refusal) = examination.refusal() {
    ///     // What a service does about it is its own affair: log it, or stop here.
    ///     assert_ne!(refusal.kind(), ErrorKind::Config);
    /// }
    /// ```
    #[must_use]
    pub fn refusal(&self) -> Option<&Error> {
        self.refusal.as_ref()
    }

    /// The findings as one JSON object, on one line.
    ///
    /// `fit`, `refusal` and `preflight` are the verdict; `features` lists each feature with
    /// `present` (`null` where the kernel gave no answer); `facts` has what was read as numbers;
    /// `findings` has the lines of `Display`.
    ///
    /// # Examples
    ///
    /// ```
    /// let json = slipring::doctor::examine().to_json();
    /// assert!(json.starts_with("{\"fit\":"));
    /// ```
    #[must_use]
    pub fn to_json(&self) -> String {
        let features = self.features.iter().map(|(feature, answer)| {
            let object = JsonObject::new()
                .string("name", feature.name)
                .string("since", feature.since)
                .bool("needed", feature.needed);
            match answer {
                Answer::Present => object.bool("present", true),
                Answer::Missing => object.bool("present", false),
                Answer::Failed(_) | Answer::NotAsked => object.null("present"),
            }
            .finish()
        });
        let findings = self.findings().into_iter().map(|finding| {
            let object = JsonObject::new()
                .string("area", finding.area)
                .string("name", finding.name)
                .string("found", &finding.found);
            match &finding.consequence {
                Some(text) => object.string("consequence", text),
                None => object.null("consequence"),
            }
            .finish()
        });
        let object = JsonObject::new().bool("fit", self.is_fit());
        let object = match &self.refusal {
            Some(refusal) => object.string("refusal", &refusal.to_string()),
            None => object.null("refusal"),
        };
        object
            .string("preflight", self.preflight_text())
            .raw("features", &json::array(features))
            .raw("facts", &self.facts.to_json())
            .raw("findings", &json::array(findings))
            .finish()
    }

    fn new(facts: Facts, answers: Answers, preflight: Option<Result<()>>) -> Examination {
        let refused = |errno| explain_setup_failure(errno, DRIVER_RING, &facts);
        let lacking = answers.features.iter().filter(|(feature, _)| feature.needed);
        let lacking = lacking.filter_map(|(feature, answer)| match answer {
            Answer::Missing => {
                let cause = format!("{} is missing: {}", feature.name, feature.costs);
                Some(refused(libc::EINVAL).because(cause))
            }
            // Such as a filter that lets rings be set up but not entered.
            Answer::Failed(errno) => Some(refused(*errno)),
            Answer::Present | Answer::NotAsked => None,
        });
        let refusal = answers.ring.err().map(refused).or_else(|| lacking.into_iter().next());
        let passed = preflight.as_ref().map(Result::is_ok);
        let refusal = refusal.or_else(|| preflight?.err());
        let (preflight, features) = (passed, answers.features);
        Examination { refusal, preflight, features, facts, configured: Vec::new() }
    }

    fn preflight_text(&self) -> &'static str {
        match self.preflight {
            None => "not run",
            Some(true) => "passed",
            Some(false) => "failed",
        }
    }

    fn findings(&self) -> Vec<Finding> {
        let mut findings = self.kernel();
        findings.extend(self.features.iter().map(|(feature, answer)| {
            let (found, consequence) = match *answer {
                Answer::Present => ("present", None),
                Answer::Missing => ("missing", Some(feature.costs.to_owned())),
                Answer::Failed(errno) => {
                    ("failed", Some(io::Error::from_raw_os_error(errno).to_string()))
                }
                Answer::NotAsked => ("not asked", None),
            };
            Finding::new("features", feature.name, found, consequence)
        }));
        findings.extend(self.limits());
        findings.extend(self.network());
        findings.extend(self.cpus());
        findings.extend(self.container());
        findings.extend(self.configured.iter().cloned());
        findings
    }

    fn kernel(&self) -> Vec<Finding> {
        let facts = &self.facts;
        let old = facts.kernel().is_some_and(|kernel| kernel < NEEDED);
        let old = old.then_some("the io_uring driver needs 6.1");
        let disabled = match facts.io_uring_disabled {
            Some(1) => Some("io_uring is for CAP_SYS_ADMIN and kernel.io_uring_group only"),
            Some(2) => Some("io_uring is for nobody"),
            _ => None,
        };
        vec![
            Finding::new("kernel", "release", known(facts.release.clone()), old),
            Finding::new("kernel", "io_uring_disabled", known(facts.io_uring_disabled), disabled),
            Finding::new("kernel", "preflight", self.preflight_text(), NOTHING),
        ]
    }

    fn limits(&self) -> Vec<Finding> {
        let facts = &self.facts;
        let pair = |(soft, hard)| match (limit_text(soft), limit_text(hard)) {
            (soft, hard) if soft == hard => soft,
            (soft, hard) => format!("{soft}, hard {hard}"),
        };
        let room = facts.nofile.filter(|(_, hard)| *hard < u64::MAX).map(|(_, hard)| {
            let free = hard.saturating_sub(facts.open_fds.unwrap_or(0) as u64);
            format!("at most {free} more connections, listeners and files in this process")
        });
        let exempt = facts.can_over_machine(Capability::IpcLock) == Some(true);
        let charged = facts.kernel().is_none_or(|kernel| kernel >= CHARGES_RINGS);
        let rings = match facts.memlock {
            Some((soft, _)) if charged && !exempt && soft < u64::MAX => {
                let rings = soft / ring_bytes(DRIVER_RING.sq_entries, DRIVER_RING.cq_entries);
                Some(format!(
                    "room for {rings} cores of default size, over all of the user's processes"
                ))
            }
            Some(_) if exempt => Some("does not apply: CAP_IPC_LOCK exempts".to_owned()),
            _ => None,
        };
        let descriptors = known(facts.nofile.map(pair));
        let locked = known(facts.memlock.map(pair));
        vec![
            Finding::new("limits", "descriptors", descriptors, room),
            Finding::new("limits", "locked bytes", locked, rings),
        ]
    }

    fn network(&self) -> Vec<Finding> {
        let facts = &self.facts;
        let (migrate, restart) = match facts.tcp_migrate_req {
            Some(true) => ("1", MIGRATES),
            Some(false) => ("0", MIGRATES_NOT),
            None => ("unknown", MIGRATES_NOT),
        };
        let backlog = facts.somaxconn.map(|most| {
            format!("each core's listener queues at most {most}, whatever SLIPRING_BACKLOG says")
        });
        let flood = (facts.tcp_syncookies == Some(0))
            .then_some("a flood of SYNs fills the queues and keeps clients out");
        vec![
            Finding::new("network", "tcp_migrate_req", migrate, Some(restart)),
            Finding::new("network", "somaxconn", known(facts.somaxconn), backlog),
            Finding::new("network", "tcp_syncookies", known(facts.tcp_syncookies), flood),
            Finding::new("network", "congestion", known(facts.congestion.clone()), NOTHING),
        ]
    }

    fn cpus(&self) -> Vec<Finding> {
        let facts = &self.facts;
        let allowed = facts.allowed_cpus.as_deref().unwrap_or_default();
        let cores = default_cpus(allowed, facts.quota_cpus).len();
        let plan = match cores {
            1 => "1 core, unless SLIPRING_CPUS says otherwise".to_owned(),
            cores => format!("{cores} cores, unless SLIPRING_CPUS says otherwise"),
        };
        let quota = facts.quota_cpus.map(|cpus| format!("{cpus:.2} CPUs"));
        let short = facts
            .quota_cpus
            .filter(|cpus| *cpus < allowed.len() as f64)
            .map(|_| "cores that spin or are pinned use it up and then stand still; do neither");
        let stalls = facts.nr_throttled.filter(|periods| *periods > 0).map(
            |_| "each stopped all cores for the rest of its period; raise or lift the CPU limit",
        );
        let throttled = facts.nr_throttled.map(|periods| format!("{periods} periods"));
        let mask = facts.allowed_cpus.as_deref().map(cpu_list);
        let refusal = SpinState::refusal(facts, cores);
        let spinning = refusal.map_or("possible".to_owned(), |refusal| refusal.to_string());
        let insists = refusal.map(|_| "SLIPRING_SPIN_US is off, unless SLIPRING_SPIN_SHARED=1");
        vec![
            Finding::new("cpus", "affinity mask", known(mask), Some(plan)),
            Finding::new("cpus", "cgroup quota", quota.unwrap_or("none found".to_owned()), short),
            Finding::new("cpus", "throttled", known(throttled), stalls),
            Finding::new("cpus", "spinning", spinning, insists),
        ]
    }

    fn container(&self) -> Vec<Finding> {
        let facts = &self.facts;
        let hint = facts.container.unwrap_or("no sign of one");
        let seccomp = match facts.seccomp {
            Some(0) => "none".to_owned(),
            Some(1) => "strict".to_owned(),
            Some(2) => "a filter".to_owned(),
            other => known(other),
        };
        let passes = (facts.seccomp == Some(2) && self.is_fit())
            .then_some("lets through what slipring asked for here");
        let held = [
            (Capability::SysAdmin, "CAP_SYS_ADMIN"),
            (Capability::NetAdmin, "CAP_NET_ADMIN"),
            (Capability::IpcLock, "CAP_IPC_LOCK"),
        ];
        let held: Vec<&str> = held
            .into_iter()
            .filter(|(capability, _)| facts.can(*capability) == Some(true))
            .map(|(_, name)| name)
            .collect();
        let capabilities = match facts.capabilities {
            Some(_) if held.is_empty() => "none that matter".to_owned(),
            capabilities => known(capabilities.map(|_| held.join(" "))),
        };
        let filter = (facts.can(Capability::NetAdmin) == Some(false)).then_some(
            "without CAP_NET_ADMIN a drain cannot hold off new handshakes while listeners close",
        );
        let privileges = facts.no_new_privs.map(|on| if on { "yes" } else { "no" });
        vec![
            Finding::new("container", "sign", hint, NOTHING),
            Finding::new("container", "seccomp", seccomp, passes),
            Finding::new("container", "no_new_privs", known(privileges), NOTHING),
            Finding::new("container", "capabilities", capabilities, filter),
        ]
    }
}

impl fmt::Display for Examination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.refusal {
            None => f.write_str("fit: slipring runs on io_uring here")?,
            Some(refusal) => write!(f, "not fit: slipring's io_uring driver fails: {refusal}")?,
        }
        let findings = self.findings();
        let width = |text: fn(&Finding) -> &str| {
            let explained = findings.iter().filter(|finding| finding.consequence.is_some());
            explained.map(|finding| text(finding).len()).max().unwrap_or(0)
        };
        let names = findings.iter().map(|finding| finding.name.len()).max().unwrap_or(0);
        let founds = width(|finding| &finding.found);
        let mut area = "";
        for finding in &findings {
            if finding.area != area {
                area = finding.area;
                write!(f, "\n{area}")?;
            }
            write!(f, "\n  {:names$}  ", finding.name)?;
            match &finding.consequence {
                Some(consequence) => write!(f, "{:founds$}  {consequence}", finding.found)?,
                None => f.write_str(&finding.found)?,
            }
        }
        Ok(())
    }
}

const NOTHING: Option<String> = None;

/// From this release on, and up to 5.11, rings count as locked memory.
const CHARGES_RINGS: (u32, u32) = (6, 14);

const MIGRATES: &str = "connections queued on a listener that closes move to another one: an \
                        overlapping restart resets none";
const MIGRATES_NOT: &str = "an overlapping restart can reset connections that complete while the \
                            old listeners close; 1 prevents it";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn all(answer: Answer) -> Answers {
        let features = features::FEATURES.iter().map(|feature| (feature, answer)).collect();
        Answers { ring: Ok(()), features }
    }

    fn refused(errno: i32) -> Answers {
        Answers { ring: Err(errno), ..all(Answer::NotAsked) }
    }

    fn line<'a>(text: &'a str, name: &str) -> &'a str {
        let mut lines = text.lines().map(str::trim);
        lines.find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    #[test]
    fn this_machine_is_examined_and_reported() {
        let examination = examine();
        let text = examination.to_string();
        assert_eq!(text.starts_with("fit: "), examination.is_fit(), "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()), "{text:?}");
    }

    #[test]
    fn a_preflight_decides_the_verdict_where_rings_are_to_be_had() {
        for (preflight, fit, word) in [
            (None, true, "not run"),
            (Some(Ok(())), true, "passed"),
            (Some(Err(Error::new(ErrorKind::Unsupported, "no end of stream"))), false, "failed"),
        ] {
            let examination = Examination::new(Facts::default(), all(Answer::Present), preflight);
            assert_eq!(examination.is_fit(), fit, "{word}");
            assert!(line(&examination.to_string(), "preflight").ends_with(word));
        }
        let failing = examine_with(|| Err(Error::new(ErrorKind::Io, "trial run")));
        assert!(!failing.is_fit());
    }

    #[test]
    fn a_container_that_blocks_io_uring_is_told_why() {
        let facts = Facts {
            seccomp: Some(2),
            container: Some("/.dockerenv"),
            capabilities: Some(0),
            ..Facts::default()
        };
        let examination = Examination::new(facts, refused(libc::EPERM), None);
        let text = examination.to_string();
        assert!(!examination.is_fit());
        assert!(text.starts_with("not fit: ") && text.contains("Docker"), "{text}");
        assert!(line(&text, "DEFER_TASKRUN").ends_with("not asked"), "{text}");
        assert!(line(&text, "capabilities").contains("CAP_NET_ADMIN"), "{text}");
    }

    #[test]
    fn a_missing_feature_costs_the_driver_or_only_what_it_says() {
        for index in 0..features::FEATURES.len() {
            let mut answers = all(Answer::Present);
            answers.features[index].1 = Answer::Missing;
            let (feature, _) = answers.features[index];
            let examination = Examination::new(Facts::default(), answers, None);
            assert_eq!(examination.is_fit(), !feature.needed, "{}", feature.name);
            let text = examination.to_string();
            let name = format!("{} ", feature.name);
            assert!(line(&text, &name).ends_with(feature.costs), "{text}");
        }
    }

    #[test]
    fn a_ring_that_cannot_be_entered_is_not_fit() {
        let facts = Facts { seccomp: Some(2), ..Facts::default() };
        let examination = Examination::new(facts, all(Answer::Failed(libc::EPERM)), None);
        let refusal = examination.refusal().unwrap();
        assert_eq!(refusal.kind(), ErrorKind::Unsupported);
        assert!(refusal.to_string().contains("seccomp"), "{refusal}");
    }

    #[test]
    fn limits_and_quotas_are_told_with_their_consequence() {
        let facts = Facts {
            release: Some("6.18.0".to_owned()),
            capabilities: Some(0),
            memlock: Some((8 << 20, u64::MAX)),
            nofile: Some((1024, 4096)),
            open_fds: Some(96),
            quota_cpus: Some(1.5),
            nr_throttled: Some(7),
            allowed_cpus: Some(vec![0, 1, 2, 3]),
            tcp_migrate_req: Some(true),
            ..Facts::default()
        };
        let text = Examination::new(facts, all(Answer::Present), None).to_string();
        for (name, part) in [
            ("descriptors", "at most 4000 more"),
            ("locked bytes", "room for 81 cores"),
            ("affinity mask", "2 cores"),
            ("cgroup quota", "1.50 CPUs"),
            ("throttled", "7 periods"),
            ("spinning", "refused: it would use up a cgroup's CPU quota"),
            ("tcp_migrate_req", "resets none"),
        ] {
            assert!(line(&text, name).contains(part), "{text}");
        }
    }

    #[test]
    fn json_has_the_verdict_and_one_line() {
        let facts = Facts { release: Some("6.1 \"x\"\n".to_owned()), ..Facts::default() };
        let json = Examination::new(facts, refused(libc::ENOSYS), None).to_json();
        assert!(json.starts_with("{\"fit\":false,\"refusal\":\"set up an io_uring"), "{json}");
        assert!(json.contains("\"release\":\"6.1 \\\"x\\\"\\n\""), "{json}");
        assert!(json.contains("\"present\":null") && !json.contains('\n'), "{json}");
    }
}

//! What the results have to be read with: the rig, the code, the peers' versions, the method.

use std::{env, path::Path, process::Command};

use slipring_peers::{json::Json, rig::Rig};

use super::Options;

pub struct About {
    pub rig: Rig,
    /// Of the repository, with a word if files differ from it.
    pub commit: String,
    pub command: String,
    pub method: String,
    versions: Vec<(&'static str, String)>,
}

impl About {
    pub fn new(options: &Options) -> Self {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let method = format!(
            "server on CPU {}, load on CPU {}; {} rounds of {} s per server and question, in \
             slices that alternate between the servers; CPU time from \
             /proc/PID/task/*/schedstat, memory from smaps_rollup (anonymous); each byte that \
             comes back is compared; figures are medians of the rounds, ratios are taken within \
             a round",
            options.server_cpu,
            options.load_cpu,
            options.rounds,
            options.seconds.as_secs_f64(),
        );
        Self {
            rig: Rig::here(None),
            commit: commit(),
            command: format!("scripts/compare.sh {}", arguments.join(" ")).trim_end().to_owned(),
            method,
            versions: PEERS.iter().filter_map(|&name| Some((name, version(name)?))).collect(),
        }
    }

    pub fn versions_text(&self) -> String {
        let versions = self.versions.iter().map(|(name, version)| format!("{name} {version}"));
        versions.collect::<Vec<_>>().join(", ")
    }

    pub fn json(&self) -> Vec<(&'static str, Json)> {
        let Rig { kernel, cpu, cpus, congestion, load, date } = &self.rig;
        let versions = self.versions.iter().map(|(name, version)| (*name, version.as_str().into()));
        vec![
            ("date", date.as_str().into()),
            ("kernel", kernel.as_str().into()),
            ("cpu", cpu.as_str().into()),
            ("cpus", (*cpus).into()),
            ("congestion", congestion.as_str().into()),
            ("load_average", load.parse().unwrap_or(f64::NAN).into()),
            ("commit", self.commit.as_str().into()),
            ("command", self.command.as_str().into()),
            ("method", self.method.as_str().into()),
            ("versions", Json::Object(versions.collect())),
        ]
    }
}

/// What this tree is at.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let output = Command::new("git").arg("-C").arg(here).args(arguments).output().ok()?;
        let text = output.status.success().then(|| String::from_utf8(output.stdout).ok())??;
        Some(text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "HEAD"]) else { return "unknown".to_owned() };
    match git(&["status", "--porcelain"]) {
        Some(changes) if changes.is_empty() => commit,
        _ => format!("{commit} with changes"),
    }
}

/// The version that the lock file has; the greatest, if there are several.
fn version(name: &str) -> Option<String> {
    let lock = include_str!("../../Cargo.lock");
    let packages = lock.split("[[package]]");
    let named = format!("name = \"{name}\"\n");
    let package = packages.filter(|package| package.contains(&named)).last()?;
    let version = package.lines().find_map(|line| line.strip_prefix("version = \""))?;
    Some(version.trim_end_matches('"').to_owned())
}

const PEERS: &[&str] = &[
    "slipring",
    "kimojio",
    "ringline",
    "monoio",
    "compio",
    "compio-driver",
    "ntex",
    "ntex-net",
    "tokio-uring",
    "tokio",
    "glommio",
    "hyper",
    "actix-web",
];

//! What the documents in `docs/` say can be used as it stands: the manifest, the units and the
//! seccomp rule are well-formed, and the variables and files that they name exist.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::not_run;
use serde_json::Value;

#[test]
fn the_manifest_gives_a_drain_its_time_and_asks_the_admin_listener() {
    const TEST: &str = "the_manifest_gives_a_drain_its_time_and_asks_the_admin_listener";
    let [manifest] = &blocks("deploy.md", "yaml")[..] else { panic!("one manifest") };
    let convert = "import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout)";
    let output = run(Command::new("python3").args(["-c", convert]), manifest);
    let text = match output {
        Some(output) if output.status.success() => output.stdout,
        other => return not_run(TEST, format!("python3 with yaml: {other:?}")),
    };
    let manifest: Value = serde_json::from_slice(&text).expect("it was made by a machine");
    let pod = &manifest["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let variable = |name: &str| {
        let env = container["env"].as_array().expect("a list");
        let found = env.iter().find(|variable| variable["name"] == name);
        let value = found.and_then(|variable| variable["value"].as_str()).expect("text");
        value.parse::<u64>().expect("milliseconds")
    };
    let grace_ms = 1_000 * pod["terminationGracePeriodSeconds"].as_u64().expect("seconds");
    assert!(grace_ms >= variable("SLIPRING_DRAIN_MS") + 5_000, "{grace_ms}");
    assert!(2 * variable("SLIPRING_LAMEDUCK_MS") < variable("SLIPRING_DRAIN_MS"));
    let ports = container["ports"].as_array().expect("a list");
    let admin = ports.iter().find(|port| port["name"] == "admin").expect("it has a port");
    assert_eq!(admin["containerPort"], 9100);
    for (probe, path) in
        [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")]
    {
        let asked = &container[probe]["httpGet"];
        assert_eq!((&asked["path"], &asked["port"]), (&path.into(), &"admin".into()), "{probe}");
    }
    let profile = &pod["securityContext"]["seccompProfile"];
    assert_eq!(profile["localhostProfile"], "profiles/slipring.json");
}

#[test]
fn systemd_finds_no_fault_with_the_units() {
    const TEST: &str = "systemd_finds_no_fault_with_the_units";
    let [socket, service] = &blocks("deploy.md", "ini")[..] else { panic!("two units") };
    let folder = std::env::temp_dir().join(format!("slipring-units-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let names = ["echo.socket", "echo.service"].map(|name| folder.join(name));
    fs::write(&names[0], socket).expect("write a unit");
    // A program that is there; the units are not otherwise changed.
    let this = std::env::current_exe().expect("the path of this test");
    let service = service.replace("/usr/bin/echo-service", &this.display().to_string());
    fs::write(&names[1], service).expect("write a unit");
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["verify", "--man=no"]).args(&names);
    let output = run(&mut analyze, "");
    fs::remove_dir_all(&folder).expect("our own folder");
    let Some(output) = output else { return not_run(TEST, "there is no systemd-analyze") };
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("Failed to") {
        return not_run(TEST, said);
    }
    // It may find faults with the machine's own units.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("echo.")).collect();
    assert!(ours.is_empty(), "{said}");
}

#[test]
fn the_seccomp_rule_allows_the_three_calls_and_adds_to_a_profile() {
    const TEST: &str = "the_seccomp_rule_allows_the_three_calls_and_adds_to_a_profile";
    let path = docs().join("seccomp-io_uring.json");
    let text = fs::read_to_string(&path).expect("the fragment");
    let fragment: Value = serde_json::from_str(&text).expect("it is JSON");
    let [rule] = &fragment["syscalls"].as_array().expect("a list")[..] else { panic!("one rule") };
    assert_eq!(rule["action"], "SCMP_ACT_ALLOW");
    let calls = ["io_uring_setup", "io_uring_enter", "io_uring_register"];
    assert_eq!(rule["names"], Value::from(calls.to_vec()));

    let shell = blocks("deploy.md", "sh");
    let jq = shell.iter().find(|block| block.starts_with("jq ")).expect("the command");
    let folder = std::env::temp_dir().join(format!("slipring-seccomp-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    fs::copy(&path, folder.join("seccomp-io_uring.json")).expect("copy the fragment");
    let default = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"]}]}"#;
    fs::write(folder.join("default.json"), default).expect("write a profile");
    let output = run(Command::new("sh").args(["-ec", jq]).current_dir(&folder), "");
    let made = fs::read_to_string(folder.join("slipring.json")).unwrap_or_default();
    fs::remove_dir_all(&folder).expect("our own folder");
    if made.is_empty() {
        return not_run(TEST, format!("jq: {output:?}"));
    }
    let made: Value = serde_json::from_str(&made).expect("it is JSON");
    assert_eq!(made["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(made["syscalls"][0]["names"][0], "read");
    assert_eq!(made["syscalls"][1], *rule);
}

#[test]
fn variables_and_files_that_the_documents_name_exist() {
    let table = slipring::Config::table_markdown();
    let known: BTreeSet<&str> = words(&table).collect();
    let mut faults = Vec::new();
    for path in markdown_files() {
        let text = fs::read_to_string(&path).expect("a document");
        let unknown = words(&text).filter(|word| !known.contains(word));
        faults.extend(unknown.map(|word| format!("{}: {word}", path.display())));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or_default();
            let there = path.parent().expect("a folder").join(file);
            if !link.contains("://") && !file.is_empty() && !there.exists() {
                faults.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The names of variables.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let word = |c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    text.split(word).filter(|word| word.starts_with("SLIPRING_") && !word.ends_with('_'))
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

fn markdown_files() -> Vec<PathBuf> {
    let files = fs::read_dir(docs()).expect("the folder").map(|file| file.expect("a file").path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The blocks of a language in a document.
fn blocks(document: &str, language: &str) -> Vec<String> {
    let text = fs::read_to_string(docs().join(document)).expect("a document");
    let begin = format!("```{language}\n");
    let rest = text.split(&begin).skip(1);
    rest.filter_map(|rest| rest.split("```").next()).map(str::to_owned).collect()
}

/// `None` where there is no such program.
fn run(command: &mut Command, input: &str) -> Option<Output> {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().ok()?;
    // One that does not read has its reasons, which its output tells.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
    child.wait_with_output().ok()
}

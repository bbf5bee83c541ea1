//! The counters as metrics: what a strict reader of Prometheus' text format makes of a server that
//! works, and the names that others rely on.

use crate::common::exposition::Page;
use crate::common::load::{Load, Outcome, answer_one};
use crate::common::{config, connect, echo, settle, start, wait_until};
use slipring::{CloseReason, ConnectionState, Server};
use std::io::{Read, Write};

/// A rename, a new one and one that is gone are all seen here: dashboards and alerts hold on to
/// names, so this list changes with a note in the changelog.
const NAMES: &[(&str, &str)] = &[
    ("slipring_abandoned_bytes_total", "counter"),
    ("slipring_accept_errors_total", "counter"),
    ("slipring_accept_pauses_total", "counter"),
    ("slipring_broadcast_values_missed_total", "counter"),
    ("slipring_buffers_missing_total", "counter"),
    ("slipring_build_info", "gauge"),
    ("slipring_calls_answered_total", "counter"),
    ("slipring_calls_dropped_total", "counter"),
    ("slipring_calls_failed_total", "counter"),
    ("slipring_calls_run_total", "counter"),
    ("slipring_calls_total", "counter"),
    ("slipring_completion_queue_overflows_total", "counter"),
    ("slipring_completions_total", "counter"),
    ("slipring_connection_age_seconds", "histogram"),
    ("slipring_connection_oldest_age_seconds", "gauge"),
    ("slipring_connection_without_progress_seconds", "histogram"),
    ("slipring_connections", "gauge"),
    ("slipring_connections_accepted_total", "counter"),
    ("slipring_connections_closed_total", "counter"),
    ("slipring_connections_in_state", "gauge"),
    ("slipring_connections_moved_in_total", "counter"),
    ("slipring_connections_moved_out_total", "counter"),
    ("slipring_connections_peak", "gauge"),
    ("slipring_datagrams_lost_total", "counter"),
    ("slipring_datagrams_received_total", "counter"),
    ("slipring_datagrams_sent_total", "counter"),
    ("slipring_datagrams_truncated_total", "counter"),
    ("slipring_datagrams_unsent_total", "counter"),
    ("slipring_drain_phase", "gauge"),
    ("slipring_enters_total", "counter"),
    ("slipring_idle_races_total", "counter"),
    ("slipring_large_buffers_missing_total", "counter"),
    ("slipring_leaked_operations_total", "counter"),
    ("slipring_memory_pauses_total", "counter"),
    ("slipring_messages_total", "counter"),
    ("slipring_mismatches_total", "counter"),
    ("slipring_outbound_attempts", "gauge"),
    ("slipring_outbound_attempts_cancelled_total", "counter"),
    ("slipring_outbound_attempts_failed_total", "counter"),
    ("slipring_outbound_attempts_refused_total", "counter"),
    ("slipring_outbound_attempts_timed_out_total", "counter"),
    ("slipring_outbound_attempts_total", "counter"),
    ("slipring_outbound_attempts_unreachable_total", "counter"),
    ("slipring_outbound_connections_total", "counter"),
    ("slipring_panics_total", "counter"),
    ("slipring_polls_total", "counter"),
    ("slipring_queue_abandoned_total", "counter"),
    ("slipring_queue_left_total", "counter"),
    ("slipring_queue_taken_total", "counter"),
    ("slipring_queued_bytes", "gauge"),
    ("slipring_receive_pauses_total", "counter"),
    ("slipring_received_bytes_total", "counter"),
    ("slipring_sent_bytes_total", "counter"),
    ("slipring_spin_seconds_total", "counter"),
    ("slipring_spin_state", "gauge"),
    ("slipring_spins_found_total", "counter"),
    ("slipring_spins_in_vain_total", "counter"),
    ("slipring_stale_completions_total", "counter"),
    ("slipring_stalls_total", "counter"),
    ("slipring_submissions_total", "counter"),
    ("slipring_tasks", "gauge"),
    ("slipring_tasks_forced_total", "counter"),
    ("slipring_tasks_refused_total", "counter"),
    ("slipring_timers", "gauge"),
    ("slipring_turn_longest_seconds", "gauge"),
    ("slipring_turns_total", "counter"),
    ("slipring_udp_handler_failures_total", "counter"),
    ("slipring_udp_sockets", "gauge"),
    ("slipring_unknown_completions_total", "counter"),
];

#[test]
fn the_metrics_have_the_names_and_types_that_others_rely_on() {
    let (running, _) = start(Server::new(config()).listen("127.0.0.1:0", echo));
    let page = Page::read(&running.handle().stats().to_prometheus());
    let found: Vec<_> = page.families.iter().map(|(name, kind)| (&**name, &**kind)).collect();
    assert_eq!(found, NAMES);
    settle(running, 0);
}

#[test]
fn a_page_of_metrics_says_what_the_counters_say() {
    let server = Server::new(config().check_ms(10)).listen("127.0.0.1:0", echo);
    let (running, addr) = start(server);
    let handle = running.handle();
    let mut streams: Vec<_> = (0..3).map(|_| connect(addr)).collect();
    for stream in &mut streams {
        stream.write_all(b"hello").expect("send");
        stream.read_exact(&mut [0; 5]).expect("an echo");
    }
    wait_until("the census has met them", || {
        handle.stats().total().census.state(ConnectionState::Idle) == 3
    });
    let stats = handle.stats();
    let page = Page::read(&stats.to_prometheus());
    let cores: Vec<_> =
        page.of("slipring_connections").map(|(labels, _)| &labels["core"]).collect();
    let all: Vec<String> = (0..stats.cores().len()).map(|core| core.to_string()).collect();
    assert_eq!(cores, all.iter().collect::<Vec<_>>());
    for (name, value) in [
        ("slipring_connections_accepted_total", 3.0),
        ("slipring_connections", 3.0),
        ("slipring_received_bytes_total", 15.0),
        ("slipring_sent_bytes_total", 15.0),
        ("slipring_connection_age_seconds_count", 3.0),
        ("slipring_connections_in_state", 3.0),
    ] {
        assert_eq!(page.sum(name), value, "{name}");
    }
    drop(streams);
    wait_until("they have ended", || handle.stats().total().live == 0);
    let total = handle.stats().total();
    let page = Page::read(&handle.stats().to_prometheus());
    for reason in CloseReason::ALL {
        let closed = page.of("slipring_connections_closed_total");
        let of_reason = closed.filter(|(labels, _)| labels["reason"] == reason.as_str());
        let sum: f64 = of_reason.map(|(_, value)| value).sum();
        assert_eq!(sum, total.closed.get(reason) as f64, "{reason:?}");
    }
    let running_cores = page
        .of("slipring_drain_phase")
        .filter(|(labels, value)| labels["state"] == "running" && *value == 1.0);
    assert_eq!(running_cores.count(), stats.cores().len());
    settle(running, 3);
}

#[test]
fn counters_only_grow_under_load_and_up_to_the_end() {
    let (running, addr) = start(Server::new(config()).listen("127.0.0.1:0", answer_one));
    let handle = running.handle();
    let load = Load::start(addr, 4);
    let mut before = Page::read(&handle.stats().to_prometheus());
    let mut rounds = 0;
    while rounds < 200 || load.outcomes().get(Outcome::Ok) < 500 {
        let page = Page::read(&handle.stats().to_prometheus());
        assert_grown(&before, &page);
        before = page;
        rounds += 1;
    }
    let outcomes = load.stop();
    settle(running, outcomes.get(Outcome::Ok));
    let last = Page::read(&handle.stats().to_prometheus());
    assert_grown(&before, &last);
    let (accepted, closed) = (
        last.sum("slipring_connections_accepted_total"),
        last.sum("slipring_connections_closed_total"),
    );
    assert_eq!(accepted, outcomes.get(Outcome::Ok) as f64, "{outcomes}");
    assert_eq!(closed, accepted);
    let down = last.of("slipring_drain_phase").filter(|(labels, _)| labels["state"] == "down");
    assert!(down.into_iter().all(|(_, value)| value == 1.0), "the drain's end is seen too");
}

#[test]
fn the_documented_metrics_are_those_there_are() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/observability.md");
    let docs = std::fs::read_to_string(path).expect("the guide");
    let is_part = |letter: char| letter.is_ascii_lowercase() || letter == '_';
    let starts = docs.match_indices("slipring_").map(|(at, _)| &docs[at..]);
    let names = starts.map(|rest| rest.split(|letter| !is_part(letter)).next().expect("a name"));
    // The prefix by itself, and what only the admin listener's page has.
    let names = names.filter(|name| *name != "slipring_" && !name.starts_with("slipring_admin_"));
    let family = |name: &str| {
        let of_histogram = ["_bucket", "_count", "_sum"];
        of_histogram.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name).to_owned()
    };
    let documented: std::collections::BTreeSet<String> = names.map(family).collect();
    let there: std::collections::BTreeSet<_> = NAMES.iter().map(|it| it.0.to_owned()).collect();
    assert_eq!(documented, there);
}

fn assert_grown(before: &Page, after: &Page) {
    for (series, value) in before.counters() {
        let now = after.get(series).unwrap_or_else(|| panic!("{series:?} has gone"));
        assert!(now >= value, "{series:?}: {value}, then {now}");
    }
}

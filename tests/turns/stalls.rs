//! Stalls: a handler that blocks its core is named while it does and after.
//!
//! The tests take turns, since they count what else is slow on this machine as well.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::{config, connect, limit, start, turn, wait_until};
use slipring::{Config, Handle, Server, Stall};

/// A server whose handler blocks its core for as many milliseconds as it is asked to.
fn blocking(config: Config) -> Server {
    Server::new(config).listen("127.0.0.1:0", |mut conn| async move {
        while let Some(line) = conn.read_until(b'\n', 16).await? {
            let text = std::str::from_utf8(&line).expect("a number").trim();
            pause(text.parse().expect("a number"));
            conn.write(b"x").await?;
        }
        Ok(())
    })
}

fn ask(client: &mut TcpStream, ms: u64) {
    client.write_all(format!("{ms}\n").as_bytes()).expect("send");
}

fn answer(client: &mut TcpStream) {
    client.read_exact(&mut [0]).expect("the answer");
}

/// Those of our handler: on a busy machine others may be slow as well.
fn ours(stall: &Stall) -> bool {
    stall.place.is_some_and(|place| place.file().ends_with("stalls.rs"))
}

#[test]
fn a_blocked_handler_is_named_while_it_blocks_and_after() {
    let _turn = turn();
    let (running, addr) = start(blocking(config().stall_ms(100)));
    let handle = running.handle();
    let mut client = connect(addr);
    ask(&mut client, 0);
    answer(&mut client);
    let before = handle.stats().total();
    let since = Instant::now();
    ask(&mut client, 700);
    let find = |ongoing| {
        let stalls = handle.stalls();
        stalls.into_iter().find(|stall| ours(stall) && stall.ongoing == ongoing && is_long(stall))
    };
    fn is_long(stall: &Stall) -> bool {
        stall.lasted >= Duration::from_millis(300)
    }
    wait_until("it is seen while it goes on", || find(true).is_some());
    let ongoing = find(true);
    answer(&mut client);
    wait_until("it is remembered", || find(false).is_some());
    let took = since.elapsed();
    let after = find(false).expect("it was there");
    if let Some(ongoing) = ongoing {
        assert_eq!(ongoing.core, after.core);
        let text = ongoing.to_string();
        assert!(text.contains("is kept by") && text.contains("stalls.rs"), "{text}");
    }
    assert!(find(true).is_none(), "it is over");
    let margin = Duration::from_millis(20);
    assert!(after.lasted + margin >= Duration::from_millis(700), "{after:?}");
    assert!(after.lasted <= took + margin && after.began + margin >= since, "{after:?}");
    let total = handle.stats().total();
    assert!(total.stalls > before.stalls && total.turn_longest_us >= 680_000, "{total:?}");
    end(&handle);
}

/// Scenario 25, in part.
#[test]
fn the_hook_is_called_once_for_each_stall_with_its_place() {
    let _turn = turn();
    let calls: Arc<Mutex<Vec<Stall>>> = Arc::default();
    let sink = Arc::clone(&calls);
    let server = blocking(config().stall_ms(100)).on_stall(move |stall| {
        sink.lock().expect("no panic").push(*stall);
        // What the hook throws is its own.
        std::panic::resume_unwind(Box::new("on purpose, in a hook"));
    });
    let (running, addr) = start(server);
    let handle = running.handle();
    let mut client = connect(addr);
    let count = || calls.lock().expect("no panic").iter().filter(|stall| ours(stall)).count();
    for round in 1..=3 {
        let since = Instant::now();
        ask(&mut client, 1_500);
        wait_until("the hook is called", || count() == round);
        let told = since.elapsed();
        answer(&mut client);
        assert!(told < since.elapsed(), "while it goes on");
        ask(&mut client, 0);
        answer(&mut client);
    }
    // A short one may be over before anybody looks, and is told of all the same.
    ask(&mut client, 150);
    answer(&mut client);
    wait_until("the hook is called", || count() == 4);
    pause(300);
    assert_eq!(count(), 4, "once each: {:?}", calls.lock());
    end(&handle);
    let since = Instant::now();
    running.join().expect("the watchdog ends with the server");
    assert!(since.elapsed() < limit(1_000), "{:?}", since.elapsed());
}

#[test]
fn an_idle_server_with_a_hook_wakes_seldom_and_one_without_has_no_thread() {
    let _turn = turn();
    let (plain, _) = start(blocking(config()));
    assert_eq!(watchdogs().len(), 0, "no hook, no thread");
    let off = blocking(config().stall_ms(0)).on_stall(|_| {});
    let (off, _) = start(off);
    assert_eq!(watchdogs().len(), 0, "off");
    let (running, addr) = start(blocking(config()).on_stall(|_| {}));
    let mut client = connect(addr);
    ask(&mut client, 0);
    answer(&mut client);
    wait_until("the thread has begun", || watchdogs().len() == 1);
    pause(3_000);
    let before = watchdogs();
    pause(3_000);
    let after = watchdogs();
    let woken = after[0] - before[0];
    assert!(woken <= 5, "woken {woken} times in three seconds");
    for running in [plain, off, running] {
        end(&running.handle());
        running.join().expect("the report");
    }
    assert_eq!(watchdogs().len(), 0, "gone with its server");
}

fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// How often each watchdog of this process has gone to sleep.
fn watchdogs() -> Vec<u64> {
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let tasks = std::fs::read_dir("/proc/self/task").expect("the kernel lists the threads");
    let tasks = tasks.map(|task| task.expect("a thread").path());
    let ours = tasks.filter(|task| read(task.join("comm")).trim() == "slipring-watch");
    let sleeps = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.map_or(0, |count| count.trim().parse().expect("a number"))
    };
    ours.map(|task| sleeps(read(task.join("status")))).collect()
}

fn end(handle: &Handle) {
    let report = handle.drain(limit(1_000)).expect("a report");
    assert!(report.is_balanced(), "{report}");
}

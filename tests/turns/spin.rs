//! A core that looks out for news for a while before it blocks: what that saves who waits for an
//! answer, that it costs nothing where it does not pay, and that nobody is overheard.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::common::{
    config, connect, echo_server, first_cpus, late, length, limit, not_run, pin, settle, turn,
};
use slipring::{Config, SpinState};

/// One client that never sleeps, and asks again as soon as it is answered.
#[test]
fn a_closed_loop_is_answered_in_half_the_time() {
    let _turn = turn();
    let Some(cpus) = two_cpus("a closed loop") else { return };
    // In pairs, as the machine's speed changes.
    let pair = |_| {
        let [blocked, spun] = [0, 50].map(|spin_us| {
            let (running, addr) = echo_server(spinning(spin_us, cpus));
            let mut client = connect(addr);
            let p50 = on_cpu(cpus[1], || p50_of(&mut client, Duration::from_millis(150)));
            let total = running.handle().stats().total();
            assert_eq!(total.spins_found > 1_000, spin_us > 0, "{total:?}");
            drop(client);
            settle(running, 1);
            p50
        });
        println!("p50 {blocked:?} blocked, {spun:?} spun");
        spun.as_secs_f64() / blocked.as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..5 * length()).map(pair).collect();
    let ratio = median(&mut ratios);
    // What is left is the way through the kernel, which is as long either way.
    assert!(ratio < 0.75, "{ratios:.2?}");
}

/// Arrivals 200 us apart: the server's CPU time with spinning on, and without.
#[test]
fn sparse_arrivals_cost_no_more_cpu_than_with_blocking() {
    let _turn = turn();
    let Some(cpus) = two_cpus("sparse arrivals") else { return };
    let mut servers = [0, 50].map(|spin_us| {
        let (running, addr) = echo_server(spinning(spin_us, cpus));
        let thread = core_thread();
        (running, connect(addr), thread)
    });
    let all = late::Others::watch();
    on_cpu(cpus[1], || {
        let mut seen = Vec::new();
        for attempt in 0..3 {
            let mut ratios = Vec::new();
            let others = late::Others::watch();
            for round in 0..80 * length() {
                let mut cpu = [Duration::ZERO; 2];
                let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
                for server in order {
                    let (_, client, thread) = &mut servers[server];
                    let before = ran(thread);
                    sparse(client, 100);
                    cpu[server] = ran(thread) - before;
                }
                ratios.push(cpu[1].as_secs_f64() / cpu[0].as_secs_f64());
            }
            let ratio = median(&mut ratios);
            println!("attempt {attempt}: {ratio:.3}; others {:.2}", others.share());
            seen.push(ratio);
            if ratio <= SPARSE_MAX {
                return;
            }
        }
        panic!("the CPU time with spinning is {seen:.3?} of that without");
    });
    for (running, client, _) in servers {
        drop(client);
        let total = running.handle().stats().total();
        let requests = total.bytes_received / 64;
        // Who is preempted finds several at once, and they look dense.
        let percent = if all.share() > late::Others::MAX { 5 } else { 1 };
        assert!(total.spin_us < requests * 2 * percent, "over {percent} % of the time: {total:?}");
        settle(running, 1);
    }
}

/// After dense traffic, a core that has nothing to do sleeps.
#[test]
fn an_idle_server_sleeps() {
    let _turn = turn();
    let Some(cpus) = two_cpus("an idle server") else { return };
    let (running, addr) = echo_server(spinning(1_000, cpus).check_ms(3_600_000));
    let (thread, handle) = (core_thread(), running.handle());
    let mut client = connect(addr);
    on_cpu(cpus[1], || p50_of(&mut client, Duration::from_millis(200)));
    let busy = handle.stats().total();
    assert!(busy.spins_found > 100, "{busy:?}");
    thread::sleep(Duration::from_millis(20));
    let (before, cpu) = (handle.stats().total(), ran(&thread));
    assert!(before.spins_in_vain <= busy.spins_in_vain + 2, "{before:?}");
    thread::sleep(limit(1_000));
    let after = handle.stats().total();
    assert_eq!((after.enters, after.spin_us), (before.enters, before.spin_us));
    let cpu = ran(&thread) - cpu;
    assert!(cpu < Duration::from_millis(1), "{cpu:?}");
    drop(client);
    settle(running, 1);
}

/// What comes from another thread while a core spins, or is about to block, is heard at once.
#[test]
fn messages_of_other_threads_are_heard_while_a_core_spins() {
    let _turn = turn();
    let Some(cpus) = two_cpus("messages") else { return };
    let (running, _) = echo_server(spinning(100, cpus));
    let (handle, heard) = (running.handle(), Arc::new(AtomicU64::new(0)));
    let rounds = 30_000 * length();
    let longest = on_cpu(cpus[1], || {
        let mut longest = Duration::ZERO;
        for round in 0..rounds {
            let (since, heard) = (Instant::now(), Arc::clone(&heard));
            let count = Arc::clone(&heard);
            let count = move || async move {
                count.fetch_add(1, SeqCst);
            };
            handle.spawn_on(0, count).expect("it is up");
            while heard.load(SeqCst) == round {
                assert!(since.elapsed() < limit(5_000), "message {round} was lost");
                std::hint::spin_loop();
            }
            longest = longest.max(since.elapsed());
            // Now and then beyond the end of a spin.
            let pause = Duration::from_micros(round * 7 % 120);
            while since.elapsed() < pause {
                std::hint::spin_loop();
            }
        }
        longest
    });
    let total = handle.stats().total();
    println!("heard after {longest:?} at most; {} of {rounds} in spins", total.spins_found);
    assert_eq!((heard.load(SeqCst), total.messages), (rounds, rounds));
    assert!(total.spins_found > rounds / 50, "{total:?}");
    assert!(total.enters < 2 * rounds, "{total:?}");
    settle(running, 0);
}

/// On one CPU nobody spins, unless it is asked for.
#[test]
fn a_shared_cpu_is_not_spun_on_unless_that_is_asked_for() {
    let _turn = turn();
    let cpu: u16 = first_cpus(1).parse().expect("a CPU");
    let one = || config().cpus(&cpu.to_string()).spin_us(50);
    for (config, refused) in [(one(), true), (one().spin_shared(true), false)] {
        // A server may use the CPUs of the thread that starts it.
        let (running, addr) = on_cpu(cpu, || echo_server(config));
        let spin = running.handle().stats().total().spin;
        assert_eq!(spin.is_refused(), refused, "{spin}");
        let mut client = connect(addr);
        (0..100).for_each(|_| ask(&mut client));
        drop(client);
        let stats = running.handle().stats();
        let total = settle(running, 1);
        if refused {
            assert_eq!((total.spins_found, total.spins_in_vain, total.spin_us), (0, 0, 0));
            assert!(stats.to_string().contains("refused"), "{stats}");
        }
    }
}

/// Two threads want the CPU of a core that spins: it notices, and leaves off for a while.
#[test]
fn a_core_that_others_preempt_rests_from_spinning() {
    let _turn = turn();
    let Some(cpus) = two_cpus("preempted") else { return };
    let config = config().cpus(&cpus[0].to_string()).pin(Some(true)).spin_us(50);
    let (running, addr) = echo_server(config);
    let handle = running.handle();
    if handle.stats().total().spin != SpinState::On {
        not_run("preempted", handle.stats().total().spin);
        settle(running, 0);
        return;
    }
    let mut client = connect(addr);
    let rested = || handle.stats().total().spin == SpinState::Preempted;
    let (give_up, over) = (Instant::now() + limit(10_000), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            pin(cpus[0]);
            while over.load(SeqCst) == 0 {
                std::hint::spin_loop();
            }
        });
        on_cpu(cpus[1], || {
            client.set_nonblocking(true).expect("a socket");
            while !rested() && Instant::now() < give_up {
                poll_ask(&mut client);
            }
        });
        over.store(1, SeqCst);
    });
    assert!(rested(), "{:?}", handle.stats().total());
    drop(client);
    settle(running, 1);
}

/// One core, pinned; spinning whatever the machine is like, if at all.
fn spinning(spin_us: u32, cpus: [u16; 2]) -> Config {
    config().cpus(&cpus[0].to_string()).pin(Some(true)).spin_us(spin_us).spin_shared(true)
}

/// One for the core, and one for its clients.
fn two_cpus(what: &str) -> Option<[u16; 2]> {
    let cpus: Vec<u16> = first_cpus(2).split(',').map(|cpu| cpu.parse().expect("a CPU")).collect();
    if cpus.len() < 2 {
        not_run(what, "it takes two CPUs");
    }
    cpus.try_into().ok()
}

/// Does something on a thread of that CPU.
fn on_cpu<T: Send>(cpu: u16, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            pin(cpu);
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The median round trip of a client that polls for its answers.
fn p50_of(client: &mut TcpStream, time: Duration) -> Duration {
    client.set_nonblocking(true).expect("a socket");
    let (since, mut took) = (Instant::now(), Vec::new());
    while since.elapsed() < time {
        let asked = Instant::now();
        poll_ask(client);
        took.push(asked.elapsed());
    }
    took.sort_unstable();
    took[took.len() / 2]
}

fn poll_answer(client: &mut TcpStream) -> bool {
    match client.read(&mut [0; 64]) {
        Ok(bytes) => {
            assert_eq!(bytes, 64);
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}");
            false
        }
    }
}

fn poll_ask(client: &mut TcpStream) {
    client.write_all(&[7; 64]).expect("send");
    let give_up = Instant::now() + limit(5_000);
    while !poll_answer(client) {
        assert!(Instant::now() < give_up, "no answer");
        std::hint::spin_loop();
    }
}

fn ask(client: &mut TcpStream) {
    client.write_all(&[7; 64]).expect("send");
    client.read_exact(&mut [0; 64]).expect("an answer");
}

/// So many requests, one each 200 us by the clock, and their answers.
fn sparse(client: &mut TcpStream, requests: u32) {
    client.set_nonblocking(true).expect("a socket");
    let since = Instant::now();
    for request in 0..requests {
        while since.elapsed() < Duration::from_micros(200) * request {
            std::hint::spin_loop();
        }
        poll_ask(client);
    }
}

/// The thread of the core that was started last, by its folder in `/proc`.
fn core_thread() -> String {
    let tasks = fs::read_dir("/proc/self/task").expect("the kernel lists the threads");
    let ids = tasks.map(|task| task.expect("it is readable").file_name());
    let mut ids: Vec<u32> = ids.filter_map(|id| id.to_str()?.parse().ok()).collect();
    ids.sort_unstable();
    let folders = ids.iter().rev().map(|id| format!("/proc/self/task/{id}"));
    let is_core = |folder: &String| {
        fs::read_to_string(format!("{folder}/comm")).is_ok_and(|name| name.starts_with("slipring-"))
    };
    folders.into_iter().find(is_core).expect("there is a core")
}

/// How long a thread has run.
fn ran(folder: &str) -> Duration {
    let text = fs::read_to_string(format!("{folder}/schedstat")).expect("CONFIG_SCHED_INFO");
    let ran_ns = text.split(' ').next().and_then(|word| word.parse().ok());
    Duration::from_nanos(ran_ns.expect("the first number is the time it ran"))
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// 5 % more, and the noise of such a short time.
const SPARSE_MAX: f64 = 1.07;

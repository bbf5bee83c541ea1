//! Run with `cargo run --example doctor`, or with `-- --json` after it for machines.
//!
//! Says what this machine gives slipring and what it withholds. The exit status is 0 where the
//! io_uring driver runs, and 1 where it does not.

use std::process::ExitCode;

fn main() -> ExitCode {
    let examination = slipring::doctor::examine();
    if std::env::args().skip(1).any(|argument| argument == "--json") {
        println!("{}", examination.to_json());
    } else {
        println!("{examination}");
    }
    if examination.is_fit() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

//! Run with `cargo run --example doctor`, or with `-- --json` after it for machines.
//!
//! Says what this machine gives slipring and what it withholds, and what follows from the
//! variables that are set. The exit status is 0 where the io_uring driver runs, 1 where it does
//! not, and 2 where a variable is wrong.

use std::process::ExitCode;

use slipring::{Config, doctor};

fn main() -> ExitCode {
    let config = match Config::from_env() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("doctor: {error}");
            return ExitCode::from(2);
        }
    };
    let examination = doctor::examine().with_config(&config);
    if std::env::args().skip(1).any(|argument| argument == "--json") {
        println!("{}", examination.to_json());
    } else {
        println!("{examination}");
    }
    if examination.is_fit() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

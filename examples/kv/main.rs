//! The part of the Redis protocol that redis-cli and redis-benchmark use, sharded by key over the
//! cores: `SLIPRING_LISTEN=127.0.0.1:7379 cargo run --release --example kv`, then
//! `redis-cli -p 7379 set greeting hello`.
//!
//! Each core owns the keys that hash to it, in a table that needs no lock. A command for a key of
//! another core is handed over to it, together with all others for that core that have come in the
//! same piece of input. Each core does its part of a DEL, EXISTS or MGET by itself: with keys of
//! several cores these are not atomic, as those of Redis are. Requests that are typed as lines of
//! words know no quotes.
//!
//! The argument is how many MiB all values together may take, 1024 by default.

use std::cell::RefCell;
use std::process::ExitCode;

use slipring::{Config, DrainReport, Error, Result, Server};

mod bytes;
mod commands;
mod expiry;
mod lists;
mod perform;
mod replies;
mod requests;
mod resp;
mod session;
mod shards;
mod store;
mod texts;

use store::Store;

/// What a core owns.
pub(crate) type Shard = RefCell<Store>;

fn main() -> ExitCode {
    let mib = std::env::args().nth(1).map_or(Ok(1024), |mib| mib.parse::<usize>());
    let Some(bytes) = mib.ok().and_then(|mib| mib.checked_mul(1024 * 1024)) else {
        eprintln!("kv: the argument is how many MiB all values together may take, such as 1024");
        return ExitCode::from(2);
    };
    match serve(bytes) {
        Ok(report) if report.is_balanced() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kv: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(bytes: usize) -> Result<DrainReport, Error> {
    let config = Config::from_env()?;
    let mut server = Server::new(config.clone())
        .state(move |core| Shard::new(Store::new(bytes / core.cores)))
        .drain_on_signals();
    for address in config.listen_addresses() {
        server = server.listen(address, session::serve);
    }
    let running = server.start()?;
    let addresses: Vec<String> = running.local_addrs().iter().map(ToString::to_string).collect();
    println!("listening on {}", addresses.join(", "));
    let report = running.join()?;
    println!("{report}");
    Ok(report)
}

//! Blocking work off the core: the core goes on meanwhile, the answer comes at once, a panic is an
//! error, so many run at a time and no more, and a drain keeps to its deadline.
#![cfg(feature = "blocking")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use slipring::{ErrorKind, Running, task, time};

mod common;

use common::load::p99;
use common::{config, echo_server, first_cpus, limit, pin, wait_until};

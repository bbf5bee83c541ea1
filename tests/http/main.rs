//! HTTP by hyper, over real sockets. Its tests run beside each other; drains under load, which take
//! turns, are in `turns`.

#[path = "../common/mod.rs"]
mod common;

mod bodies;
mod busy;
mod deadlines;
mod http1;
mod http2;

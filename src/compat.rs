//! Other crates' traits on a connection, each behind a feature of its name.

#[cfg(feature = "hyper")]
mod hyper;
mod poll;
#[cfg(feature = "tokio-io")]
mod tokio;

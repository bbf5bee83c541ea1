//! What a stretch of load has found out.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::json::Json;

/// Requests, their time, and the latency of each.
#[derive(Clone, Debug)]
pub struct Sample {
    pub requests: u64,
    pub elapsed: Duration,
    /// In nanoseconds.
    pub latency: Histogram<u64>,
    /// By a schedule: how long after its due time a request was queued, in nanoseconds.
    pub late: Histogram<u64>,
}

impl Sample {
    pub fn new() -> Self {
        Self { requests: 0, elapsed: Duration::ZERO, latency: histogram(), late: histogram() }
    }

    /// Takes another one's figures in.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.elapsed += other.elapsed;
        self.latency.add(&other.latency).expect("both have the same bounds");
        self.late.add(&other.late).expect("both have the same bounds");
    }

    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }

    pub fn per_second(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    pub fn json(&self) -> Vec<(&'static str, Json)> {
        let mut members = vec![
            ("requests", self.requests.into()),
            ("seconds", self.elapsed.as_secs_f64().into()),
            ("per_second", self.per_second().into()),
        ];
        let quantiles = QUANTILES.map(|(name, quantile)| (name, self.quantile_us(quantile).into()));
        members.extend(quantiles);
        members.push(("max_us", (self.latency.max() as f64 / 1e3).into()));
        if !self.late.is_empty() {
            let late_us = self.late.value_at_quantile(0.99) as f64 / 1e3;
            members.push(("late_p99_us", late_us.into()));
        }
        members
    }
}

impl Default for Sample {
    fn default() -> Self {
        Self::new()
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, LATENCY_NS_MAX, 3).expect("the bounds are in order")
}

/// Puts a duration in; one above the bounds counts as the bound.
#[inline]
pub(super) fn record(histogram: &mut Histogram<u64>, ns: u64) {
    histogram.saturating_record(ns);
}

pub(super) const QUANTILES: [(&str, f64); 4] =
    [("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("p999_us", 0.999)];
const LATENCY_NS_MAX: u64 = 60_000_000_000;

//! The counters as metrics in Prometheus' text format.
//!
//! Source: the text-based exposition format, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::fmt::{self, Write};

use crate::census::Ages;
use crate::connections::ConnectionState;
use crate::drain::Phase;
use crate::report::CloseReason;
use crate::spin::SpinState;
use crate::stats::{CoreStats, Stats};

/// One counter of one core, as the table of counters describes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    pub(crate) value: u64,
    /// The value is in microseconds.
    pub(crate) is_us: bool,
}

impl Stats {
    /// The counters as metrics in Prometheus' text format, version 0.0.4, to be served as
    /// `text/plain; version=0.0.4`.
    ///
    /// All names begin with `slipring_` and end with their unit; those on `_total` only grow, and
    /// start again with the server. Each sample has the label `core`, so `sum without (core) (..)`
    /// makes the server's figure of them. `slipring_connections_closed_total` is by the `reason` of
    /// [`CloseReason`], and `slipring_connections_in_state` by the `state` of [`ConnectionState`].
    /// The histograms of [`Census`](crate::Census) show the connections that are there, as of its
    /// last walk: they rise and fall, so take `histogram_quantile` of them without `rate`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(handle: slipring::Handle) {
    /// let text = handle.stats().to_prometheus();
    /// assert!(text.contains("slipring_connections_accepted_total{core=\"0\"} "));
    /// # }
    /// ```
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let mut page = Page::default();
        page.family("build_info", Kind::Gauge, "The version of slipring; the value is always 1.");
        page.sample("build_info", &[("version", &env!("CARGO_PKG_VERSION"))], 1);
        self.write_counters(&mut page);
        self.write_closes(&mut page);
        self.write_census(&mut page);
        self.write_choice(&mut page, "spin_state", "Whether it may spin before it blocks.", |at| {
            SpinState::ALL.map(|state| (state.as_str(), at.spin == state))
        });
        self.write_choice(&mut page, "drain_phase", "Where it stands in a drain.", |at| {
            Phase::ALL.map(|phase| (phase.as_str(), at.phase == phase))
        });
        page.into_text()
    }

    fn write_counters(&self, page: &mut Page) {
        let mut cores: Vec<_> = self.cores().iter().map(CoreStats::metrics).collect();
        for Metric { name, help, .. } in CoreStats::default().metrics() {
            page.family(name, Kind::of(name), help);
            for (core, metrics) in cores.iter_mut().enumerate() {
                let Some(metric) = metrics.next() else { continue };
                let labels: Labels<'_> = &[("core", &core)];
                if metric.is_us {
                    page.sample(name, labels, Seconds::of_us(metric.value));
                } else {
                    page.sample(name, labels, metric.value);
                }
            }
        }
    }

    fn write_closes(&self, page: &mut Page) {
        let name = "connections_closed_total";
        page.family(name, Kind::Counter, "Connections closed, by reason.");
        for (core, stats) in self.cores().iter().enumerate() {
            for reason in CloseReason::ALL {
                let labels: Labels<'_> = &[("core", &core), ("reason", &reason.as_str())];
                page.sample(name, labels, stats.closed.get(reason));
            }
        }
    }

    fn write_census(&self, page: &mut Page) {
        let name = "connections_in_state";
        page.family(name, Kind::Gauge, "Connections by what they are at, as of the last census.");
        for (core, stats) in self.cores().iter().enumerate() {
            for state in ConnectionState::ALL {
                let labels: Labels<'_> = &[("core", &core), ("state", &state.as_str())];
                page.sample(name, labels, stats.census.state(state));
            }
        }
        let name = "connection_age_seconds";
        page.family(name, Kind::Histogram, "Time since the connections that are there came.");
        for (core, stats) in self.cores().iter().enumerate() {
            page.histogram(name, core, &stats.census.age);
        }
        let name = "connection_without_progress_seconds";
        page.family(name, Kind::Histogram, "Time since a byte last went either way on them.");
        for (core, stats) in self.cores().iter().enumerate() {
            page.histogram(name, core, &stats.census.without_progress);
        }
        let name = "connection_oldest_age_seconds";
        page.family(name, Kind::Gauge, "Age of the oldest connection.");
        for (core, stats) in self.cores().iter().enumerate() {
            let age = Seconds::of_ms(stats.census.oldest_age_ms);
            page.sample(name, &[("core", &core)], age);
        }
    }

    /// One of several: a sample for each, 1 for the one that it is.
    fn write_choice<const N: usize>(
        &self,
        page: &mut Page,
        name: &str,
        help: &str,
        choices: impl Fn(&CoreStats) -> [(&'static str, bool); N],
    ) {
        page.family(name, Kind::Gauge, help);
        for (core, stats) in self.cores().iter().enumerate() {
            for (choice, it_is) in choices(stats) {
                page.sample(name, &[("core", &core), ("state", &choice)], u64::from(it_is));
            }
        }
    }
}

/// What kind of metric one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn of(name: &str) -> Kind {
        if name.ends_with("_total") { Kind::Counter } else { Kind::Gauge }
    }

    fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

pub(crate) type Labels<'a> = &'a [(&'a str, &'a dyn fmt::Display)];

/// A page of metrics that grows by one line per call. Names are given without the prefix.
#[derive(Debug, Default)]
pub(crate) struct Page {
    text: String,
}

impl Page {
    /// Begins a metric, whose samples follow.
    pub(crate) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let help = plain(help.trim()).replace('\\', "\\\\").replace('\n', "\\n");
        self.line(format_args!("# HELP {PREFIX}{name} {help}"));
        self.line(format_args!("# TYPE {PREFIX}{name} {}", kind.as_str()));
    }

    pub(crate) fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(&value.to_string())))
            .collect();
        let labels = labels.join(",");
        match labels.as_str() {
            "" => self.line(format_args!("{PREFIX}{name} {value}")),
            labels => self.line(format_args!("{PREFIX}{name}{{{labels}}} {value}")),
        }
    }

    fn histogram(&mut self, name: &str, core: usize, ages: &Ages) {
        let mut count = 0;
        for (bound, more) in ages.buckets() {
            count += more;
            let bound = bound.map_or("+Inf".to_owned(), |bound| bound.as_secs().to_string());
            self.sample(&format!("{name}_bucket"), &[("core", &core), ("le", &bound)], count);
        }
        let labels: Labels<'_> = &[("core", &core)];
        self.sample(&format!("{name}_sum"), labels, Seconds::of_ms(ages.sum_ms()));
        self.sample(&format!("{name}_count"), labels, count);
    }

    pub(crate) fn into_text(self) -> String {
        self.text
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a String does not fail.
        let _ = writeln!(self.text, "{line}");
    }
}

/// A documentation's text without the targets of its links.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, link)) = rest.split_once('[')
        && let Some((name, after)) = link.split_once("](")
        && let Some((_, after)) = after.split_once(')')
    {
        plain.push_str(before);
        plain.push_str(name);
        rest = after;
    }
    plain + rest
}

/// A label's value as it stands between its quotation marks.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A time in seconds that loses no digit.
struct Seconds {
    whole: u64,
    us: u64,
}

impl Seconds {
    fn of_us(us: u64) -> Seconds {
        Seconds { whole: us / 1_000_000, us: us % 1_000_000 }
    }

    fn of_ms(ms: u64) -> Seconds {
        Seconds { whole: ms / 1_000, us: ms % 1_000 * 1_000 }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Seconds { whole, us } = self;
        if *us == 0 { write!(f, "{whole}") } else { write!(f, "{whole}.{us:06}") }
    }
}

const PREFIX: &str = "slipring_";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Counters;

    #[test]
    fn a_counter_has_its_help_its_type_and_a_line_for_each_core() {
        let counters = Counters::default();
        counters.accepted.add(3);
        counters.spin_us.add(1_000_001);
        counters.close(CloseReason::Idle);
        let stats = Stats { cores: vec![CoreStats::default(), counters.snapshot()] };
        let text = stats.to_prometheus();
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.iter().position(|line| line.contains("accepted_total"));
        let first = first.expect("it is there");
        assert!(lines[first].starts_with(
            "# HELP slipring_connections_accepted_total Connections accepted, those that another "
        ));
        assert_eq!(
            lines[first + 1..first + 4],
            [
                "# TYPE slipring_connections_accepted_total counter",
                "slipring_connections_accepted_total{core=\"0\"} 0",
                "slipring_connections_accepted_total{core=\"1\"} 3",
            ]
        );
        for line in [
            "slipring_spin_seconds_total{core=\"1\"} 1.000001",
            "slipring_connections_closed_total{core=\"1\",reason=\"idle\"} 1",
            "slipring_drain_phase{core=\"0\",state=\"running\"} 1",
            "slipring_drain_phase{core=\"0\",state=\"force\"} 0",
            "# TYPE slipring_turn_longest_seconds gauge",
        ] {
            assert!(lines.contains(&line), "{line} in {text}");
        }
    }

    #[test]
    fn a_histogram_is_cumulative_and_has_its_sum_and_count() {
        let mut stats = CoreStats::default();
        for age_ms in [500, 4_000, 999_999_999] {
            stats.census.add(ConnectionState::Idle, age_ms, 0);
        }
        let text = Stats { cores: vec![stats] }.to_prometheus();
        let of_age = |line: &&str| line.starts_with("slipring_connection_age_seconds");
        let lines: Vec<&str> = text.lines().filter(of_age).collect();
        let value = |line: &str| line.rsplit_once(' ').expect("a value").1.to_owned();
        let values: Vec<String> = lines.iter().map(|line| value(line)).collect();
        assert_eq!(
            values,
            ["1", "2", "2", "2", "2", "2", "2", "2", "2", "3", "1000004.499000", "3"],
            "{text}"
        );
        assert!(lines[1].contains("_bucket{core=\"0\",le=\"5\"}"), "{text}");
        assert!(lines[9].contains("le=\"+Inf\""), "{text}");
    }

    #[test]
    fn what_would_end_a_help_or_a_label_is_escaped() {
        let mut page = Page::default();
        page.family("x", Kind::Gauge, " a \\ in\ntwo \"lines\"");
        page.sample("x", &[("y", &"a \\ in\ntwo \"lines\"")], 1);
        assert_eq!(
            page.text,
            "# HELP slipring_x a \\\\ in\\ntwo \"lines\"\n# TYPE slipring_x gauge\n\
             slipring_x{y=\"a \\\\ in\\ntwo \\\"lines\\\"\"} 1\n"
        );
    }

    #[test]
    fn a_help_has_no_links() {
        assert_eq!(plain("a [`b`](crate::b), [c](d)."), "a `b`, c.");
        assert_eq!(plain("[a] b, [0, 1)"), "[a] b, [0, 1)");
    }

    #[test]
    fn times_lose_no_digit() {
        let text = |seconds: Seconds| seconds.to_string();
        assert_eq!(text(Seconds::of_us(0)), "0");
        assert_eq!(text(Seconds::of_us(1)), "0.000001");
        assert_eq!(text(Seconds::of_us(u64::MAX)), "18446744073709.551615");
        assert_eq!(text(Seconds::of_ms(1_500)), "1.500000");
    }
}

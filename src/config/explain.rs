//! What a configuration means: each value and its source, and what follows from them.

use std::fmt;

use super::{Config, Settings, VARIABLES, form};

/// What a [`Config`] amounts to, for a person: the answer of [`Config::explain`].
///
/// `Display` prints one line for each variable, then what follows from the values, then the
/// warnings.
#[derive(Clone, Debug)]
pub struct Explanation {
    values: Vec<String>,
    facts: Vec<Fact>,
    warnings: Vec<String>,
}

/// Something that follows from the values: of what, and what.
pub(crate) type Fact = (&'static str, String);

impl Explanation {
    pub(crate) fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// What is allowed and yet probably not meant, one sentence each.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let explanation = Config::default().user_timeout_ms(0).explain();
    /// assert!(explanation.warnings()[0].contains("SLIPRING_USER_TIMEOUT_MS"));
    /// ```
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let warnings = self.warnings.iter().map(|warning| format!("warning: {warning}"));
        let facts = self.facts.iter().map(|(name, text)| format!("{name}: {text}"));
        let lines = self.values.iter().cloned().chain(facts).chain(warnings);
        f.write_str(&lines.collect::<Vec<_>>().join("\n"))
    }
}

impl Config {
    /// Explains the configuration: every value and whether it is the default, from the environment
    /// or from code; how long a vanished peer stays unnoticed; what looks like a mistake.
    ///
    /// A configuration that [`validate`](Config::validate) refuses is explained too, with the
    /// refusal as its warning.
    ///
    /// # Examples
    ///
    /// ```
    /// use slipring::Config;
    ///
    /// let text = Config::default().idle_ms(30_000).explain().to_string();
    /// assert!(text.contains("SLIPRING_IDLE_MS = 30000 (code)"));
    /// assert!(text.contains("SLIPRING_BUFFERS = 512 (default)"));
    /// ```
    #[must_use]
    pub fn explain(&self) -> Explanation {
        let width = VARIABLES.iter().map(|variable| variable.name.len()).max().unwrap_or(0);
        let values = VARIABLES.iter().map(|variable| {
            let (text, source) = self.lookup(variable);
            let text = form::shortened(&text);
            format!("{:>width$} = {} ({source})", variable.name, text.escape_debug())
        });
        let (facts, warnings) = match self.settings() {
            Ok(settings) => (facts(&settings), warnings(&settings)),
            Err(refusal) => (Vec::new(), vec![refusal.to_string()]),
        };
        Explanation { values: values.collect(), facts, warnings }
    }
}

#[cfg(feature = "tracing")]
impl Config {
    /// The values that are not the default, in one line.
    pub(crate) fn changed(&self) -> String {
        let given = VARIABLES.iter().map(|variable| (variable.name, self.lookup(variable)));
        let changed = given.filter(|(_, (_, source))| *source != super::Source::Default);
        let texts = changed.map(|(name, (text, source))| {
            format!("{name}={} ({source})", form::shortened(&text).escape_debug())
        });
        texts.collect::<Vec<_>>().join(", ")
    }
}

fn facts(settings: &Settings) -> Vec<Fact> {
    let Settings { buffers, buffer_bytes, half_close_ms, user_timeout_ms, .. } = *settings;
    let first = |kernel_ms: Option<u64>, ours_ms: u64| match kernel_ms {
        Some(ms) if ms <= ours_ms => duration(ms),
        _ => duration(ours_ms),
    };
    let kernel_ms = Some(user_timeout_ms).filter(|ms| *ms > 0);
    let stall_ms = settings.write_stall_ms;
    let stalled = first(kernel_ms, stall_ms);
    let queued = first(kernel_ms, stall_ms + stall_ms / 4);
    let half_closed = duration(half_close_ms);
    let mut facts = vec![
        ("dead peer, idle connection", format!("found after about {} s", keepalive_s(settings))),
        ("dead peer, unacknowledged data", format!("found after about {stalled}")),
        ("dead peer, output still queued", format!("found after {queued} at most")),
        ("dead peer, half-closed before", format!("found after {half_closed} without a byte")),
    ];
    if settings.heartbeat_ms > 0 {
        let longest_ms = settings.heartbeat_ms + settings.heartbeat_ms / 10;
        let longest = duration(longest_ms + settings.heartbeat_timeout_ms);
        let name = "peer that hangs, where a heartbeat is sent";
        facts.push((name, format!("found after {longest} at most")));
    }
    let kib = u64::from(buffers) * u64::from(buffer_bytes) / 1024;
    let text = format!("{buffers} of {buffer_bytes} bytes, {kib} KiB a core");
    facts.push(("receive buffers", text));
    if settings.spin_us > 0 {
        let unless = if settings.spin_shared { "" } else { ", on CPUs of its own without a quota" };
        facts.push(("spin before blocking", format!("up to {} us{unless}", settings.spin_us)));
    }
    facts
}

fn warnings(settings: &Settings) -> Vec<String> {
    let mut warnings = Vec::new();
    let by_count_s = keepalive_by_count_s(settings);
    if settings.user_timeout_ms == 0 {
        warnings.push(
            "SLIPRING_USER_TIMEOUT_MS is off: what a closed connection has left to send to a dead \
             peer stays in the kernel for some 15 min"
                .to_owned(),
        );
    }
    if settings.user_timeout_ms > 1000 * by_count_s {
        warnings.push(format!(
            "SLIPRING_USER_TIMEOUT_MS = {} is above the {by_count_s} s that keepalive takes: the \
             kernel then ignores SLIPRING_KEEPALIVE_COUNT, and finds a dead peer of an idle \
             connection after {} s",
            settings.user_timeout_ms,
            keepalive_s(settings),
        ));
    }
    for (name, ms, other, other_ms, what) in defeated(settings) {
        if ms > other_ms {
            warnings.push(format!("{name} = {ms} is above {other} = {other_ms}, which {what}"));
        }
    }
    if settings.connections_per_ip_max as usize >= settings.connections_max {
        warnings.push(format!(
            "SLIPRING_CONNECTIONS_PER_IP_MAX = {} is never reached with SLIPRING_CONNECTIONS_MAX = \
             {}",
            settings.connections_per_ip_max, settings.connections_max,
        ));
    }
    if settings.force_grace_ms > settings.drain_ms / 10 {
        warnings.push(format!(
            "SLIPRING_FORCE_GRACE_MS = {} is above a tenth of SLIPRING_DRAIN_MS = {}, which is all \
             that it gets in a drain",
            settings.force_grace_ms, settings.drain_ms,
        ));
    }
    if settings.lameduck_ms >= settings.drain_ms {
        warnings.push(format!(
            "SLIPRING_LAMEDUCK_MS = {} leaves nothing of SLIPRING_DRAIN_MS = {} to finish \
             connections in",
            settings.lameduck_ms, settings.drain_ms,
        ));
    }
    warnings
}

/// Pairs of limits of which the first does nothing when it is above the second, and why.
fn defeated(settings: &Settings) -> Vec<(&'static str, u64, &'static str, u64, &'static str)> {
    let idle = ("SLIPRING_IDLE_MS", settings.idle_ms);
    let handler = ("SLIPRING_HANDLER_MS", settings.handler_ms);
    let lifetime = ("SLIPRING_LIFETIME_MS", settings.lifetime_ms);
    let message = ("SLIPRING_MESSAGE_MS", settings.message_ms);
    let drain = ("SLIPRING_DRAIN_MS", settings.drain_ms);
    let beat_ms = settings.heartbeat_ms + settings.heartbeat_ms / 10;
    let mut pairs = vec![
        (
            ("SLIPRING_FIRST_BYTE_MS", settings.first_byte_ms),
            idle,
            "ends a silent connection first",
        ),
        (("SLIPRING_HEARTBEAT_MS", beat_ms), idle, "ends a silent connection before it is asked"),
        (("SLIPRING_HALF_CLOSE_MS", settings.half_close_ms), handler, "ends a busy one first"),
        (
            ("SLIPRING_CONNECT_MS", settings.connect_ms),
            handler,
            "ends a handler that connects first",
        ),
        (idle, lifetime, "ends every connection first"),
        (message, lifetime, "ends every connection first"),
        (handler, lifetime, "ends every connection first"),
        (("SLIPRING_NEW_GRACE_MS", settings.new_grace_ms), drain, "ends a drain first"),
        (("SLIPRING_IDLE_MIN_KEEP_MS", settings.idle_min_keep_ms), drain, "ends a drain first"),
        (("SLIPRING_CLOSE_SPREAD_MS", settings.close_spread_ms), drain, "ends a drain first"),
    ];
    if settings.user_timeout_ms > 0 {
        let stall = ("SLIPRING_WRITE_STALL_MS", settings.write_stall_ms);
        let kernels = ("SLIPRING_USER_TIMEOUT_MS", settings.user_timeout_ms);
        pairs.push((stall, kernels, "ends a connection first whose peer takes nothing"));
    }
    if settings.min_rate_bytes_per_s > 0 {
        let grace = ("SLIPRING_MIN_RATE_GRACE_MS", settings.min_rate_grace_ms);
        pairs.push((grace, message, "ends a slow message first"));
    }
    pairs
        .into_iter()
        .map(|((name, ms), (other, other_ms), what)| (name, ms, other, other_ms, what))
        .collect()
}

/// Seconds until keepalive gives an idle connection up by the count of its probes.
fn keepalive_by_count_s(settings: &Settings) -> u64 {
    let Settings { keepalive_idle_s, keepalive_interval_s, keepalive_count, .. } = *settings;
    u64::from(keepalive_idle_s) + u64::from(keepalive_interval_s) * u64::from(keepalive_count)
}

/// Seconds until the kernel gives an idle connection up.
///
/// With a user timeout it no longer counts probes: it gives up at the first probe that is due after
/// the timeout and is not the first of all. See `tcp_keepalive_timer` in
/// <https://github.com/torvalds/linux/blob/v6.1/net/ipv4/tcp_timer.c>.
fn keepalive_s(settings: &Settings) -> u64 {
    if settings.user_timeout_ms == 0 {
        return keepalive_by_count_s(settings);
    }
    let (idle_s, interval_s) =
        (u64::from(settings.keepalive_idle_s), u64::from(settings.keepalive_interval_s));
    let timeout_s = settings.user_timeout_ms.div_ceil(1000);
    idle_s + interval_s * timeout_s.saturating_sub(idle_s).div_ceil(interval_s).max(1)
}

fn duration(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}

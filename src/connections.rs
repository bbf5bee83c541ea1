//! What the connections of a server are at: the answer of [`Handle::connections`].
//!
//! [`Handle::connections`]: crate::Handle::connections

use std::fmt;
use std::net::SocketAddr;
use std::panic::Location;
use std::time::Duration;

use crate::bind::ListenAddr;
use crate::conn::ConnectionId;
use crate::deadline::DeadlineKind;
use crate::json::{JsonObject, array, quoted};
use crate::report::CloseReason;

macro_rules! connection_states {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// What a connection is at. Where several are true, the one that is named last.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ConnectionState {
            $($(#[doc = $doc])+ $name,)+
        }

        impl ConnectionState {
            /// Every state.
            pub const ALL: [ConnectionState; ConnectionState::COUNT] =
                [$(ConnectionState::$name,)+];
            pub(crate) const COUNT: usize = [$($text),+].len();

            /// The name as it stands in lists: lower case, words joined by `_`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(ConnectionState::$name => $text,)+
                }
            }
        }
    };
}

connection_states! {
    /// Its handler waits for a message to begin.
    Idle = "idle",
    /// Its handler waits for the rest of a message.
    Receiving = "receiving",
    /// Its handler does something else than to wait for input.
    Busy = "busy",
    /// The peer has not sent a byte since it was accepted.
    New = "new",
    /// The peer has ended its side; the handler has not finished.
    HalfClosed = "half_closed",
    /// It receives nothing: its handler has not taken what came before, or receive buffers lack.
    Paused = "paused",
    /// Its handler has finished, and the peer gets the time to read the last of the output.
    Lingering = "lingering",
    /// Output is queued that the kernel has not taken, as the peer does not take it.
    Sending = "sending",
    /// It was ended by a deadline, the peer or a drain; its handler has not let go of it.
    Ended = "ended",
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which end has begun a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The peer: it was accepted.
    Inbound,
    /// This one: [`net::connect`](crate::net::connect()) has established it.
    Outbound,
}

impl Direction {
    /// The name as it stands in lists.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
    }
}

/// One connection at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionInfo {
    /// The same as [`Connection::id`](crate::Connection::id).
    pub id: ConnectionId,
    /// The core that it belongs to, from 0.
    pub core: usize,
    /// The peer; `None` on a Unix socket, or when it is gone.
    pub peer: Option<SocketAddr>,
    /// Which end has begun it.
    pub direction: Direction,
    /// Where it was accepted; `None` for an outbound one.
    pub listener: Option<ListenAddr>,
    /// What it is at.
    pub state: ConnectionState,
    /// Why it was ended, in the state [`Ended`](ConnectionState::Ended).
    pub ended: Option<CloseReason>,
    /// Since it was accepted or established.
    pub age: Duration,
    /// Since a byte last went in either direction, or it was accepted or established.
    pub without_progress: Duration,
    /// Received so far.
    pub bytes_in: u64,
    /// Taken by the kernel for sending so far.
    pub bytes_out: u64,
    /// Received and not yet taken by the handler.
    pub bytes_unread: u64,
    /// Given to be sent and not yet taken by the kernel.
    pub bytes_queued: u64,
    /// The deadline that comes next; `None` when it is about to be closed anyhow: by a drain, or
    /// since it lingers or was ended.
    pub deadline: Option<DeadlineKind>,
    /// How long until that deadline, or until that end, is looked at.
    pub deadline_in: Duration,
    /// Every deadline that runs, and how long until it passes if nothing more happens. Empty where
    /// `deadline` is `None`.
    pub deadlines: Vec<(DeadlineKind, Duration)>,
    /// How many tasks its handler has spawned to end with it, and have not ended.
    pub children: usize,
    /// Where the handler was given to the server: the place of the `listen` call. `None` when the
    /// handler has returned.
    pub handler: Option<&'static Location<'static>>,
}

/// A core that did not say what its connections are at, as it is kept busy by a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SilentCore {
    /// Which core, from 0.
    pub core: usize,
    /// How many connections it has.
    pub connections: u64,
    /// Where the task was spawned that it runs.
    pub running: Option<&'static Location<'static>>,
}

/// The connections of a server, as its cores have listed them; see
/// [`Handle::connections`](crate::Handle::connections).
///
/// `Display` prints a table with one line each, [`Connections::to_json`] one line for machines.
///
/// # Examples
///
/// Which ones are stuck, and why:
///
/// ```no_run
/// use std::time::Duration;
///
/// # fn example(handle: slipring::Handle) -> slipring::Result<()> {
/// let stuck = handle.connections()?.without_progress_for(Duration::from_secs(10)).by_progress();
/// eprintln!("{stuck}");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Connections {
    pub(crate) infos: Vec<ConnectionInfo>,
    pub(crate) silent: Vec<SilentCore>,
}

impl Connections {
    /// All of them, as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[ConnectionInfo] {
        &self.infos
    }

    /// One after the other.
    pub fn iter(&self) -> std::slice::Iter<'_, ConnectionInfo> {
        self.infos.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.infos.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.infos.is_empty()
    }

    /// The cores that did not answer; their connections are not in the list.
    #[must_use]
    pub fn silent_cores(&self) -> &[SilentCore] {
        &self.silent
    }

    /// Those that were accepted at least so long ago.
    #[must_use]
    pub fn older_than(self, age: Duration) -> Connections {
        self.only(|info| info.age >= age)
    }

    /// Those on which no byte went either way for at least so long.
    #[must_use]
    pub fn without_progress_for(self, time: Duration) -> Connections {
        self.only(|info| info.without_progress >= time)
    }

    /// Those in a state.
    #[must_use]
    pub fn in_state(self, state: ConnectionState) -> Connections {
        self.only(|info| info.state == state)
    }

    /// The oldest first.
    #[must_use]
    pub fn by_age(mut self) -> Connections {
        self.infos.sort_by_key(|info| std::cmp::Reverse(info.age));
        self
    }

    /// Those first that have been without progress for longest.
    #[must_use]
    pub fn by_progress(mut self) -> Connections {
        self.infos.sort_by_key(|info| std::cmp::Reverse(info.without_progress));
        self
    }

    /// No more than so many of them, in the order that they have.
    #[must_use]
    pub fn first(mut self, count: usize) -> Connections {
        self.infos.truncate(count);
        self
    }

    /// The one that was accepted first.
    #[must_use]
    pub fn oldest(&self) -> Option<&ConnectionInfo> {
        self.infos.iter().max_by_key(|info| info.age)
    }

    /// The list as one line of JSON, with the keys `connections` and `silent_cores`. Times are in
    /// milliseconds.
    #[must_use]
    pub fn to_json(&self) -> String {
        self.write_to(JsonObject::new()).finish()
    }

    /// Adds the list to an object.
    pub(crate) fn write_to(&self, json: JsonObject) -> JsonObject {
        let silent = |silent: &SilentCore| {
            JsonObject::new()
                .number("core", silent.core as u64)
                .number("connections", silent.connections)
                .raw_or_null("running", silent.running.map(|place| quoted(&place.to_string())))
                .finish()
        };
        json.raw("connections", &array(self.infos.iter().map(ConnectionInfo::to_json)))
            .raw("silent_cores", &array(self.silent.iter().map(silent)))
    }

    fn only(mut self, keep: impl Fn(&ConnectionInfo) -> bool) -> Connections {
        self.infos.retain(keep);
        self
    }
}

impl<'a> IntoIterator for &'a Connections {
    type Item = &'a ConnectionInfo;
    type IntoIter = std::slice::Iter<'a, ConnectionInfo>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Connections {
    type Item = ConnectionInfo;
    type IntoIter = std::vec::IntoIter<ConnectionInfo>;

    fn into_iter(self) -> Self::IntoIter {
        self.infos.into_iter()
    }
}

impl ConnectionInfo {
    pub(crate) fn to_json(&self) -> String {
        let text = |value: &dyn fmt::Display| quoted(&value.to_string());
        let ms = |time: Duration| time.as_millis() as u64;
        let deadlines = self
            .deadlines
            .iter()
            .fold(JsonObject::new(), |json, (kind, left)| json.number(kind.as_str(), ms(*left)));
        JsonObject::new()
            .string("id", &self.id.to_string())
            .number("core", self.core as u64)
            .raw_or_null("peer", self.peer.map(|peer| text(&peer)))
            .string("direction", self.direction.as_str())
            .raw_or_null("listener", self.listener.as_ref().map(|addr| text(addr)))
            .string("state", self.state.as_str())
            .raw_or_null("ended", self.ended.map(|reason| quoted(reason.as_str())))
            .number("age_ms", ms(self.age))
            .number("without_progress_ms", ms(self.without_progress))
            .number("bytes_in", self.bytes_in)
            .number("bytes_out", self.bytes_out)
            .number("bytes_unread", self.bytes_unread)
            .number("bytes_queued", self.bytes_queued)
            .raw_or_null("deadline", self.deadline.map(|kind| quoted(kind.as_str())))
            .number("deadline_in_ms", ms(self.deadline_in))
            .raw("deadlines_in_ms", &deadlines.finish())
            .number("children", self.children as u64)
            .raw_or_null("handler", self.handler.map(|place| text(&place)))
            .finish()
    }

    /// The cells of its line in the table.
    fn cells(&self) -> [String; COLUMNS.len()] {
        let optional =
            |value: Option<String>| value.filter(|text| !text.is_empty()).unwrap_or("-".into());
        let state = match self.ended {
            Some(reason) => format!("{}: {}", self.state, reason.as_str()),
            None => self.state.to_string(),
        };
        let deadline = self.deadline.map_or("close", DeadlineKind::as_str);
        [
            self.id.to_string(),
            self.core.to_string(),
            optional(self.peer.map(|peer| peer.to_string())),
            match self.direction {
                Direction::Inbound => optional(self.listener.as_ref().map(ListenAddr::to_string)),
                Direction::Outbound => "(outbound)".to_owned(),
            },
            state,
            duration(self.age),
            duration(self.without_progress),
            self.bytes_in.to_string(),
            self.bytes_out.to_string(),
            self.bytes_unread.to_string(),
            self.bytes_queued.to_string(),
            format!("{deadline} in {}", duration(self.deadline_in)),
            optional(self.handler.map(ToString::to_string)),
        ]
    }
}

impl fmt::Display for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<_> = self.infos.iter().map(ConnectionInfo::cells).collect();
        let head = COLUMNS.map(str::to_owned);
        let mut widths = COLUMNS.map(str::len);
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        for row in std::iter::once(&head).chain(&rows) {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        for SilentCore { core, connections, running } in &self.silent {
            let running = running.map_or_else(|| "no task".to_owned(), ToString::to_string);
            writeln!(f, "core {core} did not answer: it has {connections} and runs {running}")?;
        }
        write!(f, "{} connections", self.infos.len())
    }
}

/// A time with as many digits as a person wants.
pub(crate) fn duration(time: Duration) -> String {
    match time.as_secs() {
        0 => format!("{} ms", time.as_millis()),
        1..100 => format!("{:.1} s", time.as_secs_f64()),
        100..6_000 => format!("{} min", time.as_secs() / 60),
        6_000..360_000 => format!("{} h", time.as_secs() / 3_600),
        _ => format!("{} d", time.as_secs() / 86_400),
    }
}

const COLUMNS: [&str; 13] = [
    "connection",
    "core",
    "peer",
    "listener",
    "state",
    "age",
    "no progress",
    "in",
    "out",
    "unread",
    "queued",
    "deadline",
    "handler",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Id;

    fn info(index: u32, age_s: u64, silent_s: u64, state: ConnectionState) -> ConnectionInfo {
        ConnectionInfo {
            id: ConnectionId { core: 0, id: Id { index, generation: 1 } },
            core: 0,
            peer: Some(SocketAddr::from(([127, 0, 0, 1], 9000))),
            direction: Direction::Inbound,
            listener: Some(ListenAddr::Abstract("x\"y".into())),
            state,
            ended: (state == ConnectionState::Ended).then_some(CloseReason::Idle),
            age: Duration::from_secs(age_s),
            without_progress: Duration::from_secs(silent_s),
            bytes_in: 1,
            bytes_out: 2,
            bytes_unread: 3,
            bytes_queued: 4,
            deadline: (state != ConnectionState::Ended).then_some(DeadlineKind::Idle),
            deadline_in: Duration::from_millis(1500),
            deadlines: vec![(DeadlineKind::Idle, Duration::from_millis(1500))],
            children: 2,
            handler: Some(Location::caller()),
        }
    }

    fn three() -> Connections {
        let infos = vec![
            info(1, 5, 5, ConnectionState::Idle),
            info(2, 90, 1, ConnectionState::Sending),
            info(3, 20, 20, ConnectionState::Ended),
        ];
        let silent = SilentCore { core: 1, connections: 7, running: Some(Location::caller()) };
        Connections { infos, silent: vec![silent] }
    }

    fn order(connections: &Connections) -> Vec<u32> {
        connections.iter().map(|info| info.id.id.index).collect()
    }

    #[test]
    fn filters_and_orders_are_what_they_are_called() {
        let s = Duration::from_secs;
        assert_eq!(order(&three().by_age()), [2, 3, 1]);
        assert_eq!(order(&three().by_progress()), [3, 1, 2]);
        assert_eq!(order(&three().older_than(s(20)).by_progress()), [3, 2]);
        assert_eq!(order(&three().without_progress_for(s(5))), [1, 3]);
        assert_eq!(order(&three().in_state(ConnectionState::Sending)), [2]);
        assert_eq!(three().oldest().map(|info| info.id.id.index), Some(2));
        assert_eq!(Connections::default().oldest(), None);
        assert_eq!(three().older_than(s(1_000)).silent_cores().len(), 1, "they stay unknown");
    }

    #[test]
    fn the_table_has_a_line_each_and_names_the_core_that_is_silent() {
        let text = three().to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 3 + 1 + 1, "{text}");
        assert!(lines[2].contains("sending") && lines[2].contains("idle in 1.5 s"), "{text}");
        assert!(lines[3].contains("ended: idle") && lines[3].contains("close in"), "{text}");
        assert!(lines[4].contains("core 1") && lines[4].contains("connections.rs"), "{text}");
        let column = lines[0].find("state").expect("a head");
        assert_eq!(lines[1].find("idle"), Some(column), "aligned:\n{text}");
    }

    #[test]
    fn the_json_is_one_line_with_every_field() {
        let json = three().to_json();
        assert!(!json.contains('\n'));
        assert_eq!(json.matches("\"id\":").count(), 3);
        for part in [
            "\"peer\":\"127.0.0.1:9000\"",
            "\"listener\":\"unix:@x\\\"y\"",
            "\"ended\":\"idle\"",
            "\"without_progress_ms\":5000",
            "\"deadline\":null",
            "\"deadline_in_ms\":1500",
            "\"deadlines_in_ms\":{\"idle\":1500},\"children\":2",
            "\"silent_cores\":[{\"core\":1,\"connections\":7,\"running\":\"",
        ] {
            assert!(json.contains(part), "{part} in {json}");
        }
        assert_eq!(Connections::default().to_json(), r#"{"connections":[],"silent_cores":[]}"#);
    }

    #[test]
    fn times_are_short() {
        for (ms, text) in [
            (999, "999 ms"),
            (1_500, "1.5 s"),
            (120_000, "2 min"),
            (7_200_000, "2 h"),
            (864_000_000, "10 d"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}

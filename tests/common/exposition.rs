//! A strict reader of Prometheus' text format 0.0.4: it panics at whatever the format forbids, and
//! at what is only bad custom.

use std::collections::BTreeMap;

/// A page of metrics.
pub struct Page {
    /// The families by name, with the type.
    pub families: BTreeMap<String, String>,
    samples: BTreeMap<Series, f64>,
}

/// A name and the labels.
pub type Series = (String, Labels);
pub type Labels = BTreeMap<String, String>;

impl Page {
    pub fn read(text: &str) -> Page {
        assert!(text.ends_with('\n'), "the last line ends too");
        let mut page = Page { families: BTreeMap::new(), samples: BTreeMap::new() };
        let (mut current, mut helped) = (String::new(), String::new());
        for line in text[..text.len() - 1].split('\n') {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').expect("a name and a text");
                assert!(!help.is_empty() && help.trim() == help, "{line:?}");
                assert!(unescaped(help, "").is_some(), "{line:?}");
                helped = name.to_owned();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a name and a type");
                assert_eq!(name, helped, "the help comes first");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line:?}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line:?}");
                let before = page.families.insert(name.to_owned(), kind.to_owned());
                assert!(before.is_none(), "{name} comes once");
                current = name.to_owned();
            } else {
                page.sample(line, &current);
            }
        }
        page.families.keys().for_each(|name| page.check(name));
        page
    }

    fn sample(&mut self, line: &str, family: &str) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line:?}"));
        assert!(value.is_finite() && value >= 0.0, "{line:?}");
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}').expect("a brace at the end")),
            None => (series, ""),
        };
        assert!(is_name(name), "{line:?}");
        let of_histogram = self.families.get(family).is_some_and(|kind| kind == "histogram");
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line:?} in {family}"));
        let suffixes: &[&str] = if of_histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(suffixes.contains(&suffix), "{line:?} in {family}");
        let before = self.samples.insert((name.to_owned(), read_labels(labels)), value);
        assert!(before.is_none(), "{line:?} comes once");
    }

    /// What a whole family must be like.
    fn check(&self, name: &str) {
        if self.families[name] != "histogram" {
            assert!(self.of(name).count() > 0, "{name} has a sample");
            return;
        }
        let of_buckets = format!("{name}_bucket");
        let mut by_rest: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
        for (labels, value) in self.of(&of_buckets) {
            let mut rest = labels.clone();
            let bound = rest.remove("le").expect("a bucket has its bound");
            let bound =
                if bound == "+Inf" { f64::INFINITY } else { bound.parse().expect("a bound") };
            by_rest.entry(rest).or_default().push((bound, value));
        }
        for (rest, mut buckets) in by_rest {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name} {rest:?}");
            let (bound, all) = buckets[buckets.len() - 1];
            assert_eq!(bound, f64::INFINITY, "{name} {rest:?}");
            assert_eq!(self.samples[&(format!("{name}_count"), rest.clone())], all);
            assert!(self.samples.contains_key(&(format!("{name}_sum"), rest)));
        }
    }

    /// The samples of that name, with their labels.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Labels, f64)> {
        let samples = self.samples.iter().filter(move |((other, _), _)| other == name);
        samples.map(|((_, labels), value)| (labels, *value))
    }

    /// The sum of the samples of that name.
    pub fn sum(&self, name: &str) -> f64 {
        assert!(self.of(name).next().is_some(), "there is a {name}");
        self.of(name).map(|(_, value)| value).sum()
    }

    /// The names, labels and values of the counters.
    pub fn counters(&self) -> impl Iterator<Item = (&Series, f64)> {
        let of_counter = |((name, _), _): &(&Series, &f64)| {
            self.families.get(name).is_some_and(|kind| kind == "counter")
        };
        self.samples.iter().filter(of_counter).map(|(series, value)| (series, *value))
    }

    pub fn get(&self, series: &Series) -> Option<f64> {
        self.samples.get(series).copied()
    }
}

fn is_name(text: &str) -> bool {
    let fits = |(at, letter): (usize, char)| {
        letter.is_ascii_alphabetic() || letter == '_' || (at > 0 && letter.is_ascii_digit())
    };
    !text.is_empty() && text.char_indices().all(fits)
}

/// Reads `name="value",name="value"`.
fn read_labels(text: &str) -> Labels {
    let (mut labels, mut rest) = (Labels::new(), text);
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"").unwrap_or_else(|| panic!("{text:?}"));
        assert!(is_name(name), "{text:?}");
        let mut escaped = false;
        let end = after.char_indices().find(|(_, letter)| {
            let ends = *letter == '"' && !escaped;
            escaped = *letter == '\\' && !escaped;
            ends
        });
        let (end, _) = end.unwrap_or_else(|| panic!("{text:?}"));
        let value = unescaped(&after[..end], "\"").unwrap_or_else(|| panic!("{text:?}"));
        assert!(labels.insert(name.to_owned(), value).is_none(), "{text:?}");
        rest = &after[end + 1..];
        if !rest.is_empty() {
            rest = rest.strip_prefix(',').unwrap_or_else(|| panic!("{text:?}"));
            assert!(!rest.is_empty(), "{text:?} goes on");
        }
    }
    labels
}

/// Undoes the escapes of a backslash, a line feed and what is `also` allowed; `None` for others.
fn unescaped(text: &str, also: &str) -> Option<String> {
    let (mut plain, mut letters) = (String::new(), text.chars());
    while let Some(letter) = letters.next() {
        plain.push(match (letter, letter == '\\') {
            (_, true) => match letters.next()? {
                'n' => '\n',
                escaped if escaped == '\\' || also.contains(escaped) => escaped,
                _ => return None,
            },
            (letter, _) => letter,
        });
    }
    Some(plain)
}

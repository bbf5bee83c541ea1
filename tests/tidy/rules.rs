//! The house rules, held against the tree: what a reviewer would otherwise have to look for.
//!
//! The rules work on text. Where a rule is about code, comments and literals are blanked out first,
//! so that a word in a sentence offends nobody. Each test lists every place that breaks its rule.

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn unsafe_stands_in_sys_and_nowhere_else() {
    let allowed = |file: &File| file.name.starts_with("src/sys/") || !file.is_in("src");
    let files = rust_files(&["src", "examples"]);
    let bare = files.iter().filter(|file| !allowed(file) || file.is_in("examples"));
    nothing(bare.flat_map(|file| file.code_lines_with(|line| has_word(line, "unsafe"))));
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let files = rust_files(&["src", "tests", "benches", "examples"]);
    nothing(files.iter().flat_map(|file| {
        let opens = |line: &str| line.contains("unsafe {") || line.contains("unsafe impl ");
        let blocks = file.code_lines_with(opens);
        blocks.into_iter().filter(|place| !file.comment_above(place.line).contains("SAFETY:"))
    }));
}

#[test]
fn no_file_is_longer_than_500_lines() {
    let files = rust_files(&["src", "tests", "benches", "examples"]);
    nothing(files.iter().filter_map(|file| {
        let lines = file.text.lines().count();
        (lines > FILE_LINES_MAX).then(|| file.place(lines, "is how long it is"))
    }));
}

#[test]
fn no_line_is_wider_than_100_columns() {
    let files = rust_files(&["src", "tests", "benches", "examples"]);
    nothing(files.iter().flat_map(|file| {
        let wide = |(_, line): &(usize, &str)| line.chars().count() > LINE_COLUMNS_MAX;
        file.numbered().filter(wide).map(|(number, line)| file.place(number, line))
    }));
}

#[test]
fn the_library_prints_nothing_and_leaves_nothing_for_later() {
    let files = rust_files(&["src"]);
    // Unit tests may print the seed that makes them fail.
    nothing(files.iter().filter(|file| !file.name.ends_with("/tests.rs")).flat_map(|file| {
        file.code_lines_with(|line| BANNED_MACROS.iter().any(|name| calls_macro(line, name)))
    }));
}

#[test]
fn no_test_is_ignored() {
    let files = rust_files(&["src", "tests", "examples"]);
    nothing(files.iter().flat_map(|file| {
        // Miri may: it lacks what some tests are about.
        file.code_lines_with(|line| {
            let by_condition = line.contains("cfg_attr(") && has_word(line, "ignore");
            line.contains("#[ignore") || (by_condition && !line.contains("cfg_attr(miri"))
        })
    }));
}

#[test]
fn tests_wait_for_conditions_and_not_for_time() {
    let files = rust_files(&["tests", "examples/apps/tests"]);
    let sleeps = |file: &File| file.code_lines_with(|line| line.contains("thread::sleep"));
    let excused = |file: &File| MAY_SLEEP.iter().any(|(name, _)| file.name.starts_with(name));
    nothing(files.iter().filter(|file| !excused(file)).flat_map(sleeps));
    for (name, _) in MAY_SLEEP {
        let mut excused = files.iter().filter(|file| file.name.starts_with(name));
        assert!(excused.any(|file| !sleeps(file).is_empty()), "{name} needs no excuse");
    }
}

#[test]
fn every_source_file_says_what_it_is() {
    let files = rust_files(&["src", "tests", "benches", "examples"]);
    nothing(files.iter().filter_map(|file| {
        let first = file.text.lines().next().unwrap_or_default();
        (!first.starts_with("//! ")).then(|| file.place(1, first))
    }));
}

#[test]
fn every_public_async_fn_says_whether_it_may_be_cancelled() {
    let files = rust_files(&["src"]);
    nothing(files.iter().flat_map(|file| {
        let asyncs = file.code_lines_with(|line| line.starts_with("pub async fn "));
        asyncs.into_iter().filter(|place| !file.doc_above(place.line).contains("# Cancel safety"))
    }));
}

#[test]
fn every_public_fn_that_may_fail_says_when() {
    let files = rust_files(&["src"]);
    nothing(files.iter().flat_map(|file| {
        let public = ["pub fn ", "pub async fn ", "pub const fn "];
        let starts = file.code_lines_with(|line| public.iter().any(|form| line.starts_with(form)));
        starts.into_iter().filter(|place| {
            file.returns(place.line).contains("Result<")
                && !file.doc_above(place.line).contains("# Errors")
        })
    }));
}

#[test]
fn the_readme_has_every_variable_and_every_example_and_is_short() {
    let readme = read("README.md");
    let table = slipring::Config::table_markdown();
    assert!(readme.contains(&table), "README.md needs this table, word for word:\n{table}");
    let examples = read("examples/README.md");
    for example in rust_files(&["examples"]) {
        let name = example.name.strip_prefix("examples/").expect("it is in that folder");
        if name.starts_with("apps/tests/") {
            continue;
        }
        let name = name.trim_start_matches("apps/src/bin/");
        let name = name.split('/').next().expect("it has a name").trim_end_matches(".rs");
        assert!(examples.contains(&format!("| [{name}](")), "examples/README.md lists no {name}");
    }
    let lines = readme.lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines");
}

#[test]
fn no_file_names_one_machine_or_a_download_host() {
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches", "examples", "scripts", ".ci"] {
        walk(&root().join(folder), &mut files);
    }
    let top = fs::read_dir(root()).expect("the package is a folder");
    let top = top.map(|entry| entry.expect("it is readable").path());
    // In a second work tree `.git` is a file.
    files.extend(top.filter(|path| path.is_file() && !path.ends_with(".git")));
    let files: Vec<File> = files.into_iter().filter_map(File::read_text).collect();
    nothing(files.iter().flat_map(|file| {
        let named = |(_, line): &(usize, &str)| {
            HOSTS.iter().any(|host| line.contains(host))
                || MACHINE_FOLDERS.iter().any(|folder| names_folder(line, folder))
        };
        file.numbered().filter(named).map(|(number, line)| file.place(number, line))
    }));
}

#[test]
fn comments_and_literals_are_no_code() {
    let text = r##"let a = 'x'; // unsafe {
        /* one /* in */ another */ f::<'static>("a \" b", r#"c " d"#, b'\'');"##;
    let code = code_only(text);
    assert_eq!(code.lines().count(), 2);
    assert!(!code.contains("unsafe") && !code.contains("another"), "{code}");
    assert!(code.contains("f::<'static>(") && code.trim_end().ends_with(");"), "{code}");
    for (line, word) in [("unsafe {", true), ("unsafe_code", false), ("(unsafe)", true)] {
        assert_eq!(has_word(line, "unsafe"), word, "{line}");
    }
    assert!(calls_macro("x; print!(", "print") && !calls_macro("eprint!(", "print"));
    assert!(names_folder("cd /etc/x", "/etc/") && !names_folder("\"$tree/etc/x\"", "/etc/"));
}

/// A text file of the package.
struct File {
    /// Its path below the package's root.
    name: String,
    text: String,
    /// The text with comments and literals blanked out.
    code: String,
}

/// Where a rule is broken.
struct Place {
    file: String,
    line: usize,
    text: String,
}

impl File {
    /// `None` for what is not text.
    fn read_text(path: PathBuf) -> Option<File> {
        let text =
            String::from_utf8(fs::read(&path).expect("a file of the tree is readable")).ok()?;
        let name = path.strip_prefix(root()).expect("it is below the root").display().to_string();
        let is_rust = name.ends_with(".rs");
        let code = if is_rust { code_only(&text) } else { String::new() };
        Some(File { name, text, code })
    }

    fn is_in(&self, folder: &str) -> bool {
        self.name.split('/').next() == Some(folder)
    }

    fn place(&self, line: usize, text: &str) -> Place {
        Place { file: self.name.clone(), line, text: text.trim().to_owned() }
    }

    /// The lines with their numbers, which count from 1.
    fn numbered(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// The lines whose code, without the indentation, has a property.
    fn code_lines_with(&self, property: impl Fn(&str) -> bool) -> Vec<Place> {
        let lines = self.code.lines().zip(self.numbered());
        let found = lines.filter(|(code, _)| property(code.trim()));
        found.map(|(_, (number, line))| self.place(number, line)).collect()
    }

    /// The comment right above a line, attributes in between aside.
    fn comment_above(&self, line: usize) -> String {
        self.above(line, "//")
    }

    fn doc_above(&self, line: usize) -> String {
        self.above(line, "///")
    }

    fn above(&self, line: usize, mark: &str) -> String {
        let lines: Vec<&str> = self.text.lines().take(line - 1).collect();
        // A statement may have begun on the line before.
        let block = lines.iter().rev().map(|line| line.trim());
        let block = block.skip_while(|line| line.ends_with('='));
        let block = block.take_while(|line| line.starts_with(mark) || line.starts_with("#["));
        block.filter(|line| line.starts_with(mark)).collect::<Vec<_>>().join("\n")
    }

    /// What the function returns whose signature begins on the line.
    fn returns(&self, line: usize) -> String {
        let rest = self.code.lines().skip(line - 1).collect::<Vec<_>>().join("\n");
        let signature = rest.split(['{', ';']).next().unwrap_or_default();
        let (head, _bounds) = signature.split_once("where").unwrap_or((signature, ""));
        head.rsplit_once("->").map_or(String::new(), |(_, kind)| kind.trim().to_owned())
    }
}

/// Fails with the list of the places, if there are any.
fn nothing(places: impl Iterator<Item = Place>) {
    let places: Vec<String> =
        places.map(|Place { file, line, text }| format!("  {file}:{line}: {text}")).collect();
    assert!(places.is_empty(), "{} places break this rule:\n{}", places.len(), places.join("\n"));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    let path = root().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {name}: {error}"))
}

/// All Rust files below the folders. A packaged tree lacks some folders, but never all.
fn rust_files(folders: &[&str]) -> Vec<File> {
    let mut paths = Vec::new();
    for folder in folders {
        walk(&root().join(folder), &mut paths);
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    assert!(!paths.is_empty(), "there is no Rust file in {folders:?}");
    paths.sort();
    paths.into_iter().filter_map(File::read_text).collect()
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.expect("it is readable").path();
        if path.is_dir() { walk(&path, files) } else { files.push(path) }
    }
}

/// The text with every character of comments and literals replaced by a blank; lines stay lines.
fn code_only(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let mut code = String::with_capacity(text.len());
    let mut at = 0;
    while at < letters.len() {
        let skipped = comment_len(&letters[at..])
            .or_else(|| literal_len(&letters[at..], code.chars().next_back()))
            .unwrap_or(0);
        match skipped {
            0 => code.push(letters[at]),
            _ => code.extend(letters[at..at + skipped].iter().map(|&c| blank(c))),
        }
        at += skipped.max(1);
    }
    code
}

fn blank(letter: char) -> char {
    if letter == '\n' { '\n' } else { ' ' }
}

/// How long the comment is that starts here.
fn comment_len(rest: &[char]) -> Option<usize> {
    match rest {
        ['/', '/', ..] => Some(rest.iter().position(|&c| c == '\n').unwrap_or(rest.len())),
        ['/', '*', ..] => {
            let (mut at, mut depth) = (0, 0);
            while at < rest.len() {
                match rest[at..] {
                    ['/', '*', ..] => (at, depth) = (at + 2, depth + 1),
                    ['*', '/', ..] => (at, depth) = (at + 2, depth - 1),
                    _ => at += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            Some(at)
        }
        _ => None,
    }
}

/// How long the string or character is that starts here; `before` tells a raw string's mark from
/// the end of a word.
fn literal_len(rest: &[char], before: Option<char>) -> Option<usize> {
    let starts_word = !before.is_some_and(|c| c != 'b' && c != 'c' && is_word(c));
    match rest {
        ['r', '"' | '#', ..] if starts_word => {
            let hashes = rest[1..].iter().take_while(|&&c| c == '#').count();
            if rest.get(1 + hashes) != Some(&'"') {
                return None; // A raw identifier.
            }
            let body = 2 + hashes;
            let closes = |at: &usize| {
                rest[*at] == '"'
                    && rest[at + 1..].iter().take_while(|&&c| c == '#').count() >= hashes
            };
            let end = (body..rest.len()).find(closes).map(|at| at + 1 + hashes);
            Some(end.unwrap_or(rest.len()))
        }
        ['"', ..] => Some(quoted_len(rest, '"')),
        // A lifetime has no second quotation mark.
        ['\'', '\\', ..] | ['\'', _, '\'', ..] => Some(quoted_len(rest, '\'')),
        _ => None,
    }
}

fn quoted_len(rest: &[char], mark: char) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != mark {
        at += if rest[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(rest.len())
}

fn is_word(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn has_word(line: &str, word: &str) -> bool {
    line.split(|c: char| !is_word(c)).any(|found| found == word)
}

fn calls_macro(line: &str, name: &str) -> bool {
    line.match_indices('!').any(|(at, _)| {
        let head = line[..at].strip_suffix(name);
        head.is_some_and(|head| !head.ends_with(is_word))
    })
}

/// Whether the line has the folder as a path's beginning, not as a part of one.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let goes_on = |c: char| is_word(c) || matches!(c, '/' | '.' | '-' | '}' | ')' | '~');
        !line[..at].ends_with(goes_on)
    })
}

const FILE_LINES_MAX: usize = 500;
const LINE_COLUMNS_MAX: usize = 100;
const README_LINES_MAX: usize = 250;

const BANNED_MACROS: [&str; 7] =
    ["todo", "unimplemented", "dbg", "print", "println", "eprint", "eprintln"];

/// Who may sleep, and why.
const MAY_SLEEP: &[(&str, &str)] = &[
    ("tests/common/", "waiting for a condition is what it is for"),
    ("tests/data/streams.rs", "some of its peers are slow, and for a while nothing may happen"),
    ("tests/turns/deadlines.rs", "its peers are slow"),
    ("tests/turns/drain.rs", "some of its handlers block their core, and a drain must not end yet"),
    ("tests/http/deadlines.rs", "its peers are slow"),
    ("tests/idle.rs", "for a while nothing may happen"),
    (
        "tests/processes/servers.rs",
        "a port is looked at again and again, and peers wait to be asked",
    ),
    ("tests/runtime/inspect.rs", "connections leak at a rate"),
    ("tests/descriptors/inspect_many.rs", "how late is a thread that only sleeps?"),
    ("tests/turns/idle_race.rs", "its clients pause between two requests"),
    ("tests/turns/many.rs", "very many connections take their time"),
    ("tests/turns/overload.rs", "for a while nothing may happen"),
    ("tests/descriptors/restart.rs", "a predecessor takes its time to die"),
    ("tests/turns/sigterm.rs", "a load is to be under way, and a drain must not end yet"),
    ("tests/net/vanish.rs", "a peer reads nothing for a while"),
    ("tests/soak", "some of its clients are slow, and what grows takes time to"),
    ("tests/turns/spin.rs", "for a while nothing may happen"),
    ("tests/turns/stalls.rs", "its handlers block their core, and then nothing may happen"),
    ("tests/runtime/wake.rs", "a core is blocked until ticks are missed"),
];

// In two parts, so that this file does not break its own rule.
const MACHINE_FOLDERS: [&str; 3] =
    [concat!("/", "work/"), concat!("/", "root/"), concat!("/", "home/")];
const HOSTS: [&str; 3] =
    [concat!("index", ".crates"), concat!("static", ".crates"), concat!("deb", ".debian.org")];
